"""What decoders share: their configuration, and a layer that is Llama's, with rotary grouped-query attention and a
gated MLP, each behind a norm. Families whose layer is another have it in a file of their own.

Module attributes carry Hugging Face's names, so the path of a weight is its name in the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Self, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxinfer.attention import AttentionSpec, ForwardBatch
from jaxinfer.cache import LayerCache
from jaxinfer.layers.attention import Angles, Norm, SelfAttention
from jaxinfer.layers.linear import Embedding, Linear, head_logits
from jaxinfer.layers.mlp import ACTIVATIONS, MLP, GatedMLP
from jaxinfer.layers.norm import LayerNorm, RMSNorm
from jaxinfer.layers.recurrence import MixerConfig
from jaxinfer.layers.rotary import Rope
from jaxinfer.layers.stack import RunLayer, Stream
from jaxinfer.layers.temperature import Temperature
from jaxinfer.models.causal import CausalLM, SmoothingPairs
from jaxinfer.models.config import MAX_LAYERS, ConfigReader, ModelConfig, rope_of

M = TypeVar("M", GatedMLP, MLP)
# Old checkpoints carry the rotary frequencies; they follow from config.json.
IGNORED = (r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"rotary_emb\.inv_freq")


@dataclass(frozen=True)
class DecoderConfig(ModelConfig):
    """What shapes a decoder.

    intermediate_size: the width of MLPs.
    activation: of MLPs, a name in ACTIVATIONS.
    norm_eps: of norms.
    norm_offset: is added to their weights.
    ropes: of each layer, its rotary embedding; None: it has none.
    windows: of each layer, how many tokens a query sees; None: all.
    chunks: of each layer, into how many tokens each a sequence is cut, of which a query sees its own; None, and nothing
        where no layer has any: it is not.
    temperatures: of each layer, how queries grow with their position; None, and nothing likewise: they do not.
    mixers: of each layer, what it has in place of attention; None, and nothing where no layer has any: it attends.
    scale: of attention scores.
    soft_cap: attention scores stay below it, by a tanh; None: they may be anything.
    qkv_bias, out_bias, mlp_bias, head_bias: which projections have one.
    qk_norm: queries and keys are normed.
    attention_gate: what attention makes is gated, see SelfAttention.
    sinks: heads have one, see SelfAttention.
    qkv_clip: queries, keys and values are cut off there.
    parallel: attention and MLP both take a layer's input, and are added to it together.
    embedding_scale, residual_scale, logit_scale: factors of embeddings, of what a block adds to the hidden states, and
        of logits.
    logit_soft_cap: the same of logits.
    """

    intermediate_size: int
    activation: str
    norm_eps: float
    ropes: tuple[Rope | None, ...]
    windows: tuple[int | None, ...]
    scale: float
    chunks: tuple[int | None, ...] = ()
    temperatures: tuple[Temperature | None, ...] = ()
    mixers: tuple[MixerConfig | None, ...] = ()
    norm_offset: float = 0.0
    soft_cap: float | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    qk_norm: bool = False
    attention_gate: bool = False
    sinks: bool = False
    qkv_clip: float | None = None
    parallel: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_soft_cap: float | None = None

    def __post_init__(self) -> None:
        heads = (mixer.heads_of(self.hidden_size) for mixer in self.mixers if mixer is not None)
        object.__setattr__(self, "state_heads", math.gcd(*heads))

    def for_length(self, max_model_len: int | None) -> Self:
        """With longrope's long factors, where it is more than the original context, as vLLM does it."""
        longest = max((rope.long_context for rope in self.ropes if rope is not None), default=0)
        if not longest or (max_model_len or 0) <= self.max_context:
            return self
        ropes = tuple(rope and replace(rope, long=rope.long_context > 0) for rope in self.ropes)
        return replace(self, ropes=ropes, max_context=longest)


def decoder_config(
    fields: ConfigReader,
    *,
    default_kv_heads: int | None = None,
    default_head_dim: int | None = None,
    default_activation: str = "silu",
    activation_field: str = "hidden_act",
    default_tied: bool = False,
    norm_eps: tuple[str, float] = ("rms_norm_eps", 1e-6),
    interleaved: bool = False,
    default_partial: float | None = None,
    **more: Any,
) -> DecoderConfig:
    """Reads the fields that most architectures have.

    default_...: what transformers takes where a field is absent; None: what follows from others. activation_field: its
        name.
    norm_eps: the field's name, and its default. interleaved, default_partial: see `rope_of`.
    more: what else there is to say, of the configuration's own fields; with ropes goes max_context.
    """
    hidden = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads")
    derived = {"num_key_value_heads": heads, "head_dim": hidden // heads}  # what null means, whatever the default
    absent = fields.with_absent(num_key_value_heads=default_kv_heads, head_dim=default_head_dim)
    if hidden < heads and absent.data.get("head_dim") is None:
        problem = f"without head_dim it must be at least {fields.named('num_attention_heads')}"
        raise fields.error("hidden_size", problem)
    kv_heads, head_dim = (absent.integer(name, value) for name, value in derived.items())
    if heads % kv_heads:
        problem = f"it must divide {fields.named('num_attention_heads')}"
        raise absent.error("num_key_value_heads", problem)
    layers = num_layers(fields)
    if "ropes" not in more:
        rope, context = rope_of(fields, head_dim, interleaved=interleaved, default_partial=default_partial)
        more |= {"ropes": (rope,) * layers, "max_context": context}
    return DecoderConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", default_tied),
        intermediate_size=fields.integer("intermediate_size"),
        activation=fields.choice(activation_field, default_activation, tuple(ACTIVATIONS)),
        norm_eps=fields.number(*norm_eps),
        **({"windows": (None,) * layers, "scale": head_dim**-0.5} | more),
    )


def num_layers(fields: ConfigReader) -> int:
    """The number of layers, within reason."""
    return fields.integer("num_hidden_layers", maximum=MAX_LAYERS)


def rms_norm(config: DecoderConfig, dtype: DTypeLike) -> RMSNorm:
    """Of hidden states."""
    return RMSNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype, offset=config.norm_offset)


def wide_rms_norm(config: DecoderConfig, dtype: DTypeLike) -> RMSNorm:
    """The same, rounded once, after the weights."""
    return RMSNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype, wide=True)


def layer_norm(config: DecoderConfig, dtype: DTypeLike) -> LayerNorm:
    """Of hidden states, with weights and biases."""
    return LayerNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype)


def self_attention(
    config: DecoderConfig,
    layer: int,
    *,
    qk_norm: Callable[[int], Norm] | None = None,
    norm_after_rope: bool = False,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> SelfAttention:
    """A layer's. qk_norm, norm_after_rope: see SelfAttention; where config has a norm and nothing is said, it is by
    heads."""
    if config.qk_norm and qk_norm is None:
        qk_norm = lambda _: RMSNorm(  # noqa: E731
            config.head_dim, eps=config.norm_eps, dtype=dtype, axes=(None,), offset=config.norm_offset
        )
    chunk = config.chunks[layer] if config.chunks else None
    return SelfAttention(
        config.hidden_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        qkv_bias=config.qkv_bias,
        out_bias=config.out_bias,
        spec=AttentionSpec(config.scale, config.causal, config.windows[layer], chunk, config.soft_cap),
        rope=config.ropes[layer],
        qk_norm=qk_norm,
        clip=config.qkv_clip,
        norm_after_rope=norm_after_rope,
        sinks=config.sinks,
        gated=config.attention_gate,
        temperature=config.temperatures[layer] if config.temperatures else None,
        dtype=dtype,
        rngs=rngs,
    )


def head_norm_attention(config: DecoderConfig, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> SelfAttention:
    """A layer's, whose queries and keys have layer norms with weights of each head's own, if they have norms."""

    def norm(heads: int) -> LayerNorm:
        axes = "heads" if heads == config.num_heads else "kv_heads", None
        return LayerNorm((heads, config.head_dim), eps=config.norm_eps, dtype=dtype, axes=axes, bias=False)

    return self_attention(config, layer, qk_norm=norm if config.qk_norm else None, dtype=dtype, rngs=rngs)


def _mlp(kind: type[M], config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> M:
    return kind(
        config.hidden_size,
        config.intermediate_size,
        activation=config.activation,
        bias=config.mlp_bias,
        dtype=dtype,
        rngs=rngs,
    )


gated_mlp, plain_mlp = partial(_mlp, GatedMLP), partial(_mlp, MLP)  # a layer's, with a gate and without


class DecoderLayer(nnx.Module):
    """Attention, then MLP, each behind a norm and added to the hidden states.

    SMOOTHING_PAIRS: what feeds its linears, see `calibrate`.
    make_norm, make_attention, make_mlp: a family's own, where they differ.
    """

    SMOOTHING_PAIRS: SmoothingPairs = (
        ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("self_attn.v_proj", ("self_attn.o_proj",)),
        ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ("mlp.up_proj", ("mlp.down_proj",)),
    )
    make_norm: ClassVar[Callable[..., Norm]] = staticmethod(rms_norm)
    make_attention: ClassVar[Callable[..., SelfAttention]] = staticmethod(self_attention)
    make_mlp: ClassVar[Callable[..., Any]] = staticmethod(gated_mlp)

    def __init__(self, config: DecoderConfig, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        make = type(self)
        self.input_layernorm = make.make_norm(config, dtype)
        self.self_attn = make.make_attention(config, layer, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = make.make_norm(config, dtype)
        self.mlp = make.make_mlp(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: jax.Array, angles: Angles, cache: LayerCache | None, batch: ForwardBatch
    ) -> tuple[jax.Array, LayerCache | None]:
        attended, cache = self.self_attn(self.input_layernorm(x), angles, cache, batch)
        x = x + attended
        return x + self.feed_forward(self.post_attention_layernorm(x), batch), cache

    def feed_forward(self, x: jax.Array, batch: ForwardBatch) -> jax.Array:
        """What the MLP makes of the normed hidden states."""
        return self.mlp(x)


class UngatedLayer(DecoderLayer):
    """The same with an MLP without a gate: nothing is a channel's factor of what its activation makes."""

    SMOOTHING_PAIRS: SmoothingPairs = (
        ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("self_attn.v_proj", ("self_attn.o_proj",)),
        ("post_attention_layernorm", ("mlp.up_proj",)),
    )
    make_mlp = staticmethod(plain_mlp)


class ParallelLayer(DecoderLayer):
    """Attention and MLP of the same normed hidden states, both added to them."""

    SMOOTHING_PAIRS: SmoothingPairs = (
        (
            "input_layernorm",
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"),
        ),
        ("self_attn.v_proj", ("self_attn.o_proj",)),
        ("mlp.up_proj", ("mlp.down_proj",)),
    )

    def __init__(self, config: DecoderConfig, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        make = type(self)
        self.input_layernorm = make.make_norm(config, dtype)
        self.self_attn = make.make_attention(config, layer, dtype=dtype, rngs=rngs)
        self.mlp = make.make_mlp(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: jax.Array, angles: Angles, cache: LayerCache | None, batch: ForwardBatch
    ) -> tuple[jax.Array, LayerCache | None]:
        normed = self.input_layernorm(x)
        attended, cache = self.self_attn(normed, angles, cache, batch)
        return x + attended + self.mlp(normed), cache


class Decoder(nnx.Module):
    """Embedding, layers, final norm.

    layer, norm: make a layer, and a norm.
    """

    def __init__(
        self,
        config: DecoderConfig,
        layer: Callable[..., Any],
        norm: Callable[[DecoderConfig, DTypeLike], Norm],
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([layer(config, i, dtype=dtype, rngs=rngs) for i in range(config.num_layers)])
        self.norm = norm(config, dtype)


class DecoderForCausalLM(CausalLM):
    """A decoder with its output head.

    layer, norm: a family's own, where they differ.
    """

    layer: ClassVar[Callable[..., Any]] = DecoderLayer
    norm: ClassVar[Callable[..., Norm]] = staticmethod(rms_norm)

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.model = Decoder(config, type(self).layer, type(self).norm, dtype=dtype, rngs=rngs)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(
                config.hidden_size,
                config.vocab_size,
                axes=("vocab", "embed"),
                bias=config.head_bias,
                dtype=dtype,
                rngs=rngs,
            )
        self.config = config

    def embed(self, batch: ForwardBatch) -> Stream:
        x = self.model.embed_tokens(batch.tokens, batch.mesh)
        x = jnp.where(batch.live[:, None], x, 0)  # kernels of CPUs leave out what multiplies the zeros of padding
        return x if self.config.embedding_scale == 1 else x * jnp.asarray(self.config.embedding_scale, x.dtype)

    def blocks(self) -> Sequence[Any]:
        return list(self.model.layers)

    def runner(self, batch: ForwardBatch) -> RunLayer[Any]:
        config, positions = self.config, batch.positions
        angles: dict[Rope | Temperature, Any] = {r: r.cos_sin(positions) for r in config.ropes if r is not None}
        angles |= {t: t.factors(positions) for t in config.temperatures if t is not None}
        return lambda layer, x, cache, view: layer(x, angles, cache, view)

    def finish(self, x: jax.Array) -> jax.Array:
        return self.model.norm(x)

    def logits(self, x: jax.Array, mesh: Mesh | None = None) -> jax.Array:
        config = self.config
        head = self.model.embed_tokens if config.tie_word_embeddings else self.lm_head
        logits = head_logits(self.finish(x), head, mesh)
        if config.logit_scale != 1:
            logits = logits * jnp.float32(config.logit_scale)
        if config.logit_soft_cap is not None:
            logits = jnp.tanh(logits / config.logit_soft_cap) * config.logit_soft_cap
        return logits
