"""What encoders share: BERT's layer (Devlin et al., arXiv:1810.04805), in which attention and MLP are added to what
they are of and normed, or each comes behind a norm; and the embeddings before it.

Names of weights are one family's for all, see NAMES of each: what a checkpoint calls them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxinfer.attention import AttentionSpec, ForwardBatch
from jaxinfer.attention.relative import Relative
from jaxinfer.layers.attention import Angles, SelfAttention
from jaxinfer.layers.linear import Embedding, Linear
from jaxinfer.layers.mlp import ACTIVATIONS, MLP, GatedMLP
from jaxinfer.layers.norm import LayerNorm
from jaxinfer.layers.rotary import Rope
from jaxinfer.layers.stack import RunLayer
from jaxinfer.models.body import Body
from jaxinfer.models.config import MAX_LAYERS, ConfigReader, ModelConfig
from jaxinfer.models.sources import OneOf, Part, Source, Tensor
from jaxinfer.models.weights import ParamMapping, spelled

LAYERS = "num_hidden_layers"
# Of most that are as large as BERT's base.
DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
}


@dataclass(frozen=True)
class EncoderConfig(ModelConfig):
    """What shapes an encoder.

    embedding_size: the width of embeddings.
    projected: a projection brings them to hidden_size.
    order: which of the layers that have weights of their own runs when, where some run again; nothing: each once.
    intermediate_size: the width of MLPs.
    activation: of MLPs, a name in ACTIVATIONS.
    norm_eps: of norms.
    scale: of attention scores.
    positions: rows of the table of positions; 0: there is none.
    padding_id: positions count tokens that are not this one, and begin after it, which is that of all those that are;
        None: they count all, from 0.
    token_types: how many there are; 0: they are not told apart.
    ropes: of each layer, its rotary embedding; None: it has none.
    windows: of each layer, how far a token sees to each side, itself counted; None: everywhere.
    gated: MLPs have a gate.
    norm_first: norms come before attention and MLP, and after the last layer.
    qkv_bias, out_bias, mlp_bias, down_bias, norm_bias: which parts have one.
    """

    embedding_size: int
    intermediate_size: int
    activation: str
    norm_eps: float
    scale: float
    ropes: tuple[Rope | None, ...]
    windows: tuple[int | None, ...]
    projected: bool = False
    order: tuple[int, ...] = ()
    positions: int = 0
    padding_id: int | None = None
    token_types: int = 0
    gated: bool = False
    norm_first: bool = False
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    down_bias: bool = True
    norm_bias: bool = True


C = TypeVar("C", bound=EncoderConfig)


def encoder_config(
    fields: ConfigReader,
    kind: type[C],
    *,
    names: Mapping[str, str] = MappingProxyType({}),
    eps: float = 1e-12,
    activation: str = "gelu",
    after_padding: int | None = None,
    learned: bool = True,
    rope: Rope | None = None,
    **more: Any,
) -> C:
    """Reads the fields that most have, whose defaults `fields` bring.

    kind: of configuration.
    names: of fields, where they are others than BERT's.
    eps, activation: defaults.
    after_padding: the id of padding, where positions begin after it.
    learned: positions have a table.
    rope: of all layers.
    more: what else there is to say, of the configuration's own fields.
    """
    fields.refuse("is_decoder", False)

    def integer(name: str, maximum: int = 2**24) -> int:
        return fields.integer(names.get(name, name), maximum=maximum)

    hidden, heads, layers = integer("hidden_size"), integer("num_attention_heads"), integer(LAYERS, MAX_LAYERS)
    if hidden % heads:
        of = names.get("num_attention_heads", "num_attention_heads")
        problem = f"it must be a multiple of {fields.named(of)}"
        raise fields.error(names.get("hidden_size", "hidden_size"), problem)
    positions = integer("max_position_embeddings")
    context = positions if after_padding is None else positions - after_padding - 1
    if context < 1:
        raise fields.error("max_position_embeddings", f"the first {positions - context} of the table are nobody's")
    values: dict[str, Any] = {
        "head_dim": hidden // heads,
        "embedding_size": hidden,
        "intermediate_size": integer("intermediate_size"),
        "activation": fields.choice(names.get("hidden_act", "hidden_act"), activation, tuple(ACTIVATIONS)),
        "norm_eps": fields.number(names.get("layer_norm_eps", "layer_norm_eps"), eps),
        "scale": (hidden // heads) ** -0.5,
        "ropes": (rope,) * layers,
        "windows": (None,) * layers,
        "max_context": context,
        "positions": positions if learned else 0,
        "padding_id": after_padding,
    }
    return kind(
        vocab_size=integer("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        tie_word_embeddings=False,
        causal=False,
        **(values | more),
    )


def layer_norm(config: EncoderConfig, dtype: DTypeLike, features: int | None = None) -> LayerNorm:
    """Of hidden states, or of as many features."""
    features = config.hidden_size if features is None else features
    return LayerNorm(features, eps=config.norm_eps, dtype=dtype, bias=config.norm_bias)


class Embeddings(nnx.Module):
    """Of tokens, of their positions and of their types: the sum, normed."""

    def __init__(self, config: EncoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        def table(rows: int) -> Embedding | None:
            return Embedding(rows, width, axes=(None, "embed"), dtype=dtype, rngs=rngs) if rows else None

        width = config.embedding_size
        self.words = Embedding(config.vocab_size, width, dtype=dtype, rngs=rngs)
        self.positions, self.token_types = table(config.positions), table(config.token_types)
        self.norm = layer_norm(config, dtype, width)
        self.padding_id = config.padding_id

    def __call__(self, batch: ForwardBatch) -> jax.Array:
        x = self.words(batch.tokens, batch.mesh)
        if self.token_types is not None:
            types = jnp.zeros_like(batch.tokens) if batch.token_types is None else batch.token_types
            x = x + self.token_types(types, batch.mesh)
        if self.positions is not None:
            x = x + self.positions(places(batch, self.padding_id), batch.mesh)
        return self.norm(x)


def places(batch: ForwardBatch, padding_id: int | None) -> jax.Array:
    """i32[T], rows of the table of positions. Source: fairseq, whose padding has a row of its own."""
    if padding_id is None:
        return batch.positions
    real = (batch.live & (batch.tokens != padding_id)).astype(jnp.int32)
    count = jnp.cumsum(real)
    start = batch.cu_q_lens[batch.segment_ids]
    before = jnp.where(start > 0, count[jnp.maximum(start - 1, 0)], 0)
    return (count - before) * real + padding_id


class EncoderLayer(nnx.Module):
    """Attention, then MLP, each added to its input and normed."""

    def __init__(self, config: EncoderConfig, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.self_attn = SelfAttention(
            config.hidden_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            qkv_bias=config.qkv_bias,
            out_bias=config.out_bias,
            spec=AttentionSpec(config.scale, causal=False, window=config.windows[layer]),
            rope=config.ropes[layer],
            dtype=dtype,
            rngs=rngs,
        )
        self.attn_norm = self.first_norm(config, layer, dtype)
        size = config.hidden_size, config.intermediate_size
        make = partial(GatedMLP, down_bias=config.down_bias) if config.gated else MLP
        self.mlp = make(*size, activation=config.activation, bias=config.mlp_bias, dtype=dtype, rngs=rngs)
        self.mlp_norm = layer_norm(config, dtype)

    def first_norm(self, config: EncoderConfig, layer: int, dtype: DTypeLike) -> LayerNorm | None:
        """Attention's."""
        return layer_norm(config, dtype)

    def __call__(
        self, x: jax.Array, angles: Angles, batch: ForwardBatch, relative: Relative | None = None
    ) -> jax.Array:
        assert self.attn_norm is not None
        x = self.attn_norm(x + self.self_attn(x, angles, None, batch, relative)[0])
        return self.mlp_norm(x + self.mlp(x))


class NormFirstLayer(EncoderLayer):
    """Attention, then MLP, each behind a norm and added to the hidden states; the first layer's are normed already."""

    def first_norm(self, config: EncoderConfig, layer: int, dtype: DTypeLike) -> LayerNorm | None:
        return layer_norm(config, dtype) if layer else None

    def __call__(
        self, x: jax.Array, angles: Angles, batch: ForwardBatch, relative: Relative | None = None
    ) -> jax.Array:
        normed = x if self.attn_norm is None else self.attn_norm(x)
        x = x + self.self_attn(normed, angles, None, batch, relative)[0]
        return x + self.mlp(self.mlp_norm(x))


class Encoder(Body):
    """Embeddings, layers, and a final norm where layers norm first.

    layer: a family's own, where it differs.
    """

    layer: ClassVar[Callable[..., Any]] = EncoderLayer

    def __init__(self, config: EncoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.embeddings = Embeddings(config, dtype=dtype, rngs=rngs)
        # On every device all of it: it is small, and outside of layers nothing is gathered.
        size = config.embedding_size, config.hidden_size
        self.project = Linear(*size, axes=(None, None), bias=True, dtype=dtype, rngs=rngs) if config.projected else None
        self.order = config.order or tuple(range(config.num_layers))
        make = NormFirstLayer if config.norm_first else type(self).layer
        self.layers = nnx.List([make(config, i, dtype=dtype, rngs=rngs) for i in range(max(self.order) + 1)])
        self.norm = layer_norm(config, dtype) if config.norm_first else None
        self.config = config

    def embed(self, batch: ForwardBatch) -> jax.Array:
        x = self.embeddings(batch)
        return x if self.project is None else self.project(x)

    def blocks(self) -> Sequence[Any]:
        return [self.layers[i] for i in self.order]

    def runner(self, batch: ForwardBatch) -> RunLayer[Any]:
        ropes = {rope for rope in self.config.ropes if rope is not None}
        angles: Angles = {rope: rope.cos_sin(batch.positions) for rope in ropes}
        return lambda layer, x, cache, view: (layer(x, angles, view), None)

    def finish(self, x: jax.Array) -> jax.Array:
        return x if self.norm is None else self.norm(x)


# BERT's.
EMBEDDINGS = {
    "embeddings.words.": "embeddings.word_embeddings.",
    "embeddings.positions.": "embeddings.position_embeddings.",
    "embeddings.token_types.": "embeddings.token_type_embeddings.",
    "embeddings.norm.": "embeddings.LayerNorm.",
}
NAMES = EMBEDDINGS | {
    "layers.": "encoder.layer.",
    ".self_attn.q_proj.": ".attention.self.query.",
    ".self_attn.k_proj.": ".attention.self.key.",
    ".self_attn.v_proj.": ".attention.self.value.",
    ".self_attn.o_proj.": ".attention.output.dense.",
    ".attn_norm.": ".attention.output.LayerNorm.",
    ".mlp.up_proj.": ".intermediate.dense.",
    ".mlp.down_proj.": ".output.dense.",
    ".mlp_norm.": ".output.LayerNorm.",
}
OLD_NORMS = {"weight": "gamma", "bias": "beta"}  # TensorFlow's names
IGNORED = (r"embeddings\.(position_ids|token_type_ids)", r"pooler\..+")


def encoder_weights(
    prefix: str, *heads: str, names: Mapping[str, str] = NAMES, prefixes: tuple[str, ...] = ("",)
) -> Callable[[ModelConfig], ParamMapping]:
    """How checkpoints differ from the module.

    prefix: what names of the body begin with, where there is a head; prefixes: in other checkpoints.
    heads: patterns of what heads for words have, which is left aside.
    names: parts of names here, and what checkpoints have.
    """

    def source(name: str) -> Source:
        tensor = prefix + spelled(name, names)
        norm, _, kind = tensor.rpartition(".")
        if not norm.endswith("LayerNorm"):
            return Tensor(tensor)
        return OneOf((Tensor(tensor), Tensor(f"{norm}.{OLD_NORMS[kind]}")))

    return lambda config: ParamMapping(source, prefix, IGNORED, prefixes=prefixes, beside=heads)


# Of parts of names here: which one of how many of the same size a tensor has, one after the other, and what part of its
# name is another.
Fused = Mapping[str, tuple[str, int, int]]


def fused(tensor: str, *parts: str) -> Fused:
    """Parts of one tensor."""
    return {part: (tensor, i, len(parts)) for i, part in enumerate(parts)}


def fused_qkv(tensor: str) -> Fused:
    """Queries, keys and values."""
    return fused(tensor, *(f".self_attn.{part}_proj." for part in "qkv"))


def both_spellings(
    prefix: str,
    names: Mapping[str, str],
    hub: Mapping[str, str],
    hub_fused: Fused,
    prefixes: tuple[str, ...],
    *heads: str,
) -> Callable[[ModelConfig], ParamMapping]:
    """See `encoder_weights`, of checkpoints that transformers wrote and those of the hub's own code. names: of the
    first; hub, hub_fused: of the others."""

    def weights(config: ModelConfig) -> ParamMapping:
        def source(name: str) -> Source:
            name = prefix + name
            return OneOf((Tensor(spelled(name, names)), fused_source(name, config, hub, hub_fused)))

        return ParamMapping(source, prefix, IGNORED, prefixes=prefixes, beside=heads)

    return weights


def fused_source(name: str, config: ModelConfig, names: Mapping[str, str], parts: Fused) -> Source:
    """Where a weight is in checkpoints that have some as parts of one tensor, and other names than here."""
    assert isinstance(config, EncoderConfig)
    for ours, (theirs, place, count) in parts.items():
        if ours in name:
            size = config.intermediate_size if ".mlp." in ours else config.num_heads * config.head_dim
            return Part(Tensor(spelled(name.replace(ours, theirs), names)), place * size, count * size)
    return Tensor(spelled(name, names))
