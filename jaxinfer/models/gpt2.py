"""GPT-2 (Radford et al., 2019): learned positions, layer norms, fused `[in, out]` projections in its checkpoints."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxinfer.attention import AttentionSpec, ForwardBatch, attend
from jaxinfer.cache import FullAttentionSpec, LayerCache
from jaxinfer.layers.linear import Embedding, Linear, head_logits, linears
from jaxinfer.layers.mlp import ACTIVATIONS
from jaxinfer.layers.norm import LayerNorm
from jaxinfer.layers.stack import RunLayer
from jaxinfer.models.causal import CausalLM, SmoothingPairs
from jaxinfer.models.config import MAX_LAYERS, ConfigReader, ModelConfig
from jaxinfer.models.registry import Architecture
from jaxinfer.models.sources import Part, Source, Tensor, Transposed
from jaxinfer.models.weights import ParamMapping


@dataclass(frozen=True)
class GPT2Config(ModelConfig):
    """GPT-2's own fields.

    inner_size: the width of MLPs.
    activation: of MLPs, a name in ACTIVATIONS.
    norm_eps: of layer norms.
    scales: of attention scores, one a layer.
    """

    inner_size: int
    activation: str
    norm_eps: float
    scales: tuple[float, ...]


def parse(fields: ConfigReader) -> GPT2Config:
    """`reorder_and_upcast_attn` needs nothing: scores are always accumulated and normalized in float32."""
    hidden, heads = fields.integer("n_embd", 768), fields.integer("n_head", 12)
    layers = fields.integer("n_layer", 12, maximum=MAX_LAYERS)
    if hidden % heads:
        raise fields.error("n_embd", f"it must be a multiple of {fields.named('n_head')}")
    scale = (hidden // heads) ** -0.5 if fields.boolean("scale_attn_weights", True) else 1.0
    by_layer = fields.boolean("scale_attn_by_inverse_layer_idx", False)
    return GPT2Config(
        vocab_size=fields.integer("vocab_size", 50257),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        max_context=fields.integer("n_positions", 1024),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", True),
        inner_size=fields.integer("n_inner", 4 * hidden),
        activation=fields.choice("activation_function", "gelu_new", tuple(ACTIVATIONS)),
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        scales=tuple(scale / (i + 1) if by_layer else scale for i in range(layers)),
    )


class GPT2Attention(nnx.Module):
    """Multi-head attention without rotary positions."""

    def __init__(self, config: GPT2Config, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        def linear(*axes: str) -> Linear:
            return Linear(config.hidden_size, config.hidden_size, axes=axes, bias=True, dtype=dtype, rngs=rngs)

        self.q_proj, *kv = (linear(axis, "embed") for axis in ("heads", "kv_heads", "kv_heads"))
        self.k_proj, self.v_proj = kv
        self.c_proj = linear("embed", "heads")
        self.head_dim = config.head_dim
        self.spec = AttentionSpec(scale=config.scales[layer])
        self.cache_spec = FullAttentionSpec(config.num_kv_heads, config.head_dim)

    def __call__(
        self, x: jax.Array, cache: LayerCache | None, batch: ForwardBatch
    ) -> tuple[jax.Array, LayerCache | None]:
        projected = linears(x, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (out.reshape(x.shape[0], -1, self.head_dim) for out in projected)
        out, cache = attend(q, k, v, cache, batch, self.spec)
        return self.c_proj(out.reshape(x.shape)), cache


class GPT2MLP(nnx.Module):
    """Two layers with an activation between."""

    def __init__(self, config: GPT2Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
        hidden, inner = config.hidden_size, config.inner_size
        self.c_fc = Linear(hidden, inner, axes=("mlp", "embed"), bias=True, dtype=dtype, rngs=rngs)
        self.c_proj = Linear(inner, hidden, axes=("embed", "mlp"), bias=True, dtype=dtype, rngs=rngs)
        self.activation = config.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.c_proj(ACTIVATIONS[self.activation](self.c_fc(x)))


class GPT2Block(nnx.Module):
    """Attention, then MLP, each behind a norm and added to the hidden states.

    SMOOTHING_PAIRS: what feeds its linears, see `calibrate`.
    """

    SMOOTHING_PAIRS: SmoothingPairs = (
        ("ln_1", ("attn.q_proj", "attn.k_proj", "attn.v_proj")),
        ("attn.v_proj", ("attn.c_proj",)),
        ("ln_2", ("mlp.c_fc",)),
    )

    def __init__(self, config: GPT2Config, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.ln_1 = LayerNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype)
        self.attn = GPT2Attention(config, layer, dtype=dtype, rngs=rngs)
        self.ln_2 = LayerNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype)
        self.mlp = GPT2MLP(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: jax.Array, cache: LayerCache | None, batch: ForwardBatch
    ) -> tuple[jax.Array, LayerCache | None]:
        attended, cache = self.attn(self.ln_1(x), cache, batch)
        x = x + attended
        return x + self.mlp(self.ln_2(x)), cache


class GPT2Model(nnx.Module):
    """Token and position embeddings, blocks, final norm."""

    def __init__(self, config: GPT2Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.wte = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.wpe = Embedding(config.max_context, config.hidden_size, axes=(None, "embed"), dtype=dtype, rngs=rngs)
        self.h = nnx.List([GPT2Block(config, i, dtype=dtype, rngs=rngs) for i in range(config.num_layers)])
        self.ln_f = LayerNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype)


class GPT2ForCausalLM(CausalLM):
    """GPT-2 with its (normally tied) output head."""

    def __init__(self, config: GPT2Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.transformer = GPT2Model(config, dtype=dtype, rngs=rngs)
        self.tied = config.tie_word_embeddings
        if not self.tied:
            size = (config.hidden_size, config.vocab_size)
            self.lm_head = Linear(*size, axes=("vocab", "embed"), dtype=dtype, rngs=rngs)

    def embed(self, batch: ForwardBatch) -> jax.Array:
        model = self.transformer
        return model.wte(batch.tokens, batch.mesh) + model.wpe(batch.positions, batch.mesh)

    def blocks(self) -> Sequence[GPT2Block]:
        return list(self.transformer.h)

    def runner(self, batch: ForwardBatch) -> RunLayer[GPT2Block]:
        return lambda block, x, cache, view: block(x, cache, view)

    def finish(self, x: jax.Array) -> jax.Array:
        return self.transformer.ln_f(x)

    def logits(self, x: jax.Array, mesh: Mesh | None = None) -> jax.Array:
        return head_logits(self.finish(x), self.transformer.wte if self.tied else self.lm_head, mesh)


def source(name: str, width: int) -> Source:
    """Linear weights are stored `[in, out]`, and q, k and v fused in `c_attn`."""
    if fused := re.fullmatch(r"(.*\.attn)\.([qkv])_proj\.(weight|bias)", name):
        parent, which, kind = fused.groups()
        tensor = Tensor(f"{parent}.c_attn.{kind}")
        return Part(Transposed(tensor) if kind == "weight" else tensor, width * "qkv".index(which), 3 * width)
    return Transposed(Tensor(name)) if re.fullmatch(r".*\.(c_proj|c_fc)\.weight", name) else Tensor(name)


def weights(config: ModelConfig) -> ParamMapping:
    """Old checkpoints carry the causal mask as `attn.bias` and `attn.masked_bias`."""
    of = partial(source, width=config.hidden_size)
    return ParamMapping(of, "transformer.", (r"h\.\d+\.attn\.(masked_)?bias",), "transformer.wte.weight")


ARCHITECTURE = Architecture(parse, GPT2ForCausalLM, weights)
