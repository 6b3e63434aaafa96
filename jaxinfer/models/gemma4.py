"""Gemma 4, its text model (Google, 2026): Gemma 3's layer with plain norm weights and heads of two sizes. Some models
have keys that are values too, layers that read keys and values of others, an input of each layer's own, or experts
beside the MLP."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxinfer.attention import AttentionSpec, ForwardBatch, attend
from jaxinfer.cache import LayerCache, SharedSpec, attention_spec
from jaxinfer.layers.attention import Angles
from jaxinfer.layers.experts import Experts
from jaxinfer.layers.linear import Embedding, Linear, linears
from jaxinfer.layers.mlp import ACTIVATIONS, GatedMLP, Gating
from jaxinfer.layers.norm import RMSNorm
from jaxinfer.layers.router import Router, Routing
from jaxinfer.models.causal import SmoothingPairs
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.decoder import IGNORED, DecoderForCausalLM, wide_rms_norm
from jaxinfer.models.gemma4_config import Gemma4Config, parse
from jaxinfer.models.moe import STACKED, packed
from jaxinfer.models.registry import Architecture
from jaxinfer.models.sources import Source, Tensor
from jaxinfer.models.weights import ParamMapping

KeysValues = tuple[jax.Array, jax.Array]  # each `[T, K, d]`


class Stream(NamedTuple):
    """What goes from layer to layer.

    x: hidden states `[T, D]`.
    inputs: of each layer that is still to come, its own input `[T, P]`; none where the model has no such.
    shared: keys and values of this step that later layers read, by the layer that made them.
    """

    x: jax.Array
    inputs: tuple[jax.Array, ...]
    shared: dict[int, KeysValues]


class Gemma4Attention(nnx.Module):
    """Grouped-query attention whose queries, keys and values are normed, with scores as they are. Without a projection
    of values they are keys before their norm; without keys of its own a layer reads another's."""

    def __init__(self, config: Gemma4Config, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        (kv_heads, head_dim), window = config.heads[layer], config.windows[layer]
        linear = partial(Linear, dtype=dtype, rngs=rngs)
        into = partial(linear, config.hidden_size, bias=config.qkv_bias)
        norm = partial(RMSNorm, head_dim, eps=config.norm_eps, dtype=dtype, axes=(None,), wide=True)
        inside, owner = config.num_heads * head_dim, config.owners[layer]
        self.q_proj, self.q_norm = into(inside, axes=("heads", "embed")), norm()
        self.o_proj = linear(inside, config.hidden_size, axes=("embed", "heads"), bias=config.out_bias)
        self.reads = None if owner == layer else owner
        self.lends = layer if owner == layer and config.owners.count(layer) > 1 else None
        if self.reads is None:
            self.k_proj, self.k_norm = into(kv_heads * head_dim, axes=("kv_heads", "embed")), norm()
            self.v_proj = None if config.key_is_value[layer] else into(kv_heads * head_dim, axes=("kv_heads", "embed"))
            self.v_norm = norm(scale=False)
        self.spec = AttentionSpec(config.scale, window=window, writes=self.reads is None)
        self.rope, self.head_dim = config.ropes[layer], head_dim
        self.cache_spec = (
            attention_spec(kv_heads, head_dim, window, config.num_heads // kv_heads)
            if self.reads is None
            else SharedSpec(self.reads)
        )

    def __call__(
        self,
        x: jax.Array,
        angles: Angles,
        cache: LayerCache | None,
        batch: ForwardBatch,
        shared: dict[int, KeysValues],
    ) -> tuple[jax.Array, LayerCache | None, dict[int, KeysValues]]:
        """`x [T, D]` -> `[T, D]`, the layer's cache with this step's keys and values, and those that others read."""
        assert self.rope is not None
        own = [] if self.reads is not None else [self.k_proj, *([] if self.v_proj is None else [self.v_proj])]
        q, *kv = (out.reshape(len(x), -1, self.head_dim) for out in linears(x, self.q_proj, *own))
        q = self.rope.rotate(self.q_norm(q), angles[self.rope])
        if self.reads is not None:
            k, v = shared[self.reads]
        else:
            k, v = self.rope.rotate(self.k_norm(kv[0]), angles[self.rope]), self.v_norm(kv[-1])
        if self.lends is not None:
            shared = shared | {self.lends: (k, v)}
        out, cache = attend(q, k, v, cache, batch, self.spec)
        return self.o_proj(out.reshape(len(x), -1)), cache, shared


class Gemma4Router(nnx.Module):
    """Of normed and scaled hidden states; shares of a token's experts add up to one, and then each has its factor."""

    def __init__(self, config: Gemma4Config, routing: Routing, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype, scale=False)
        self.scale = nnx.Param(jnp.ones(config.hidden_size, dtype), axes=("embed",))
        self.proj = Router(config.hidden_size, routing, dtype=dtype, rngs=rngs)
        self.per_expert_scale = nnx.Param(jnp.ones(routing.experts, dtype), axes=(None,))
        self.root = config.hidden_size**-0.5

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        experts, shares = self.proj(self.norm(x) * self.scale.get_value() * jnp.asarray(self.root, x.dtype))
        return experts, shares * self.per_expert_scale.get_value()[experts].astype(jnp.float32)


class Gemma4Layer(nnx.Module):
    """Attention, then MLP (and experts beside it), then the layer's own input of each token behind a gate: each is
    normed, and added to the hidden states. All of that has a factor."""

    SMOOTHING_PAIRS: SmoothingPairs = (
        ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ("mlp.up_proj", ("mlp.down_proj",)),
    )

    def __init__(self, config: Gemma4Config, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        hidden, own, activation = config.hidden_size, config.per_layer_size, config.activation
        norm, linear = partial(wide_rms_norm, config, dtype), partial(Linear, dtype=dtype, rngs=rngs)
        self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        self.self_attn = Gemma4Attention(config, layer, dtype=dtype, rngs=rngs)
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = norm(), norm()
        self.mlp = GatedMLP(hidden, config.widths[layer], activation=activation, dtype=dtype, rngs=rngs)
        self.has_experts, self.has_input, self.activation = config.routing is not None, own > 0, activation
        if config.routing is not None:
            self.post_feedforward_layernorm_1 = norm()
            self.router = Gemma4Router(config, config.routing, dtype=dtype, rngs=rngs)
            self.pre_feedforward_layernorm_2 = norm()
            self.experts = Experts(
                hidden,
                config.expert_size,
                routing=config.routing,
                gating=Gating(activation),
                dtype=dtype,
                rngs=rngs,
            )
            self.post_feedforward_layernorm_2 = norm()
        if own:
            self.per_layer_input_gate = linear(hidden, own, axes=(None, "embed"))
            self.per_layer_projection = linear(own, hidden, axes=("embed", None))
            self.post_per_layer_input_norm = norm()
        self.layer_scalar = nnx.Param(jnp.ones(1, dtype), axes=(None,))

    def __call__(
        self, stream: Stream, angles: Angles, cache: LayerCache | None, batch: ForwardBatch
    ) -> tuple[Stream, LayerCache | None]:
        x, inputs, shared = stream
        attended, cache, shared = self.self_attn(self.input_layernorm(x), angles, cache, batch, shared)
        x = x + self.post_attention_layernorm(attended)
        x = x + self.post_feedforward_layernorm(self.feed_forward(x, batch))
        if self.has_input:
            own, *rest = inputs
            gate = ACTIVATIONS[self.activation](self.per_layer_input_gate(x))
            x = x + self.post_per_layer_input_norm(self.per_layer_projection(gate * own))
            inputs = tuple(rest)
        return Stream(x * self.layer_scalar.get_value(), inputs, shared), cache

    def feed_forward(self, x: jax.Array, batch: ForwardBatch) -> jax.Array:
        """Of the hidden states: experts have a norm of their own of them, and the router has them as they are."""
        out = self.mlp(self.pre_feedforward_layernorm(x))
        if not self.has_experts:
            return out
        sparse = self.experts(self.pre_feedforward_layernorm_2(x), *self.router(x), batch.live).astype(x.dtype)
        return self.post_feedforward_layernorm_1(out) + self.post_feedforward_layernorm_2(sparse)


class KeysAsValuesLayer(Gemma4Layer):
    """The same without a projection of values."""

    SMOOTHING_PAIRS: SmoothingPairs = (
        ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj")),
        *Gemma4Layer.SMOOTHING_PAIRS[1:],
    )


class QueriesLayer(Gemma4Layer):
    """The same with queries alone: keys and values are another layer's."""

    SMOOTHING_PAIRS: SmoothingPairs = (
        ("input_layernorm", ("self_attn.q_proj",)),
        *Gemma4Layer.SMOOTHING_PAIRS[1:],
    )


def gemma4_layer(config: Gemma4Config, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> Gemma4Layer:
    """A layer."""
    if config.owners[layer] != layer:
        kind: type[Gemma4Layer] = QueriesLayer
    else:
        kind = KeysAsValuesLayer if config.key_is_value[layer] else Gemma4Layer
    return kind(config, layer, dtype=dtype, rngs=rngs)


class Gemma4ForCausalLM(DecoderForCausalLM):
    """Gemma 4 with its head. What layers take besides is looked up by token, and projected from the embeddings."""

    layer = staticmethod(gemma4_layer)
    norm = staticmethod(wide_rms_norm)
    config: Gemma4Config

    def __init__(self, config: Gemma4Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype, rngs=rngs)
        body: Any = self.model
        if size := config.per_layer_size:
            width = config.num_layers * size
            body.embed_tokens_per_layer = Embedding(config.per_layer_vocab, width, dtype=dtype, rngs=rngs)
            body.per_layer_model_projection = Linear(
                config.hidden_size, width, axes=(None, None), dtype=dtype, rngs=rngs
            )
            body.per_layer_projection_norm = RMSNorm(size, eps=config.norm_eps, dtype=dtype, axes=(None,), wide=True)

    def embed(self, batch: ForwardBatch) -> Stream:
        x = super().embed(batch)
        return Stream(x, self.layer_inputs(x, batch) if self.config.per_layer_size else (), {})

    def layer_inputs(self, x: jax.Array, batch: ForwardBatch) -> tuple[jax.Array, ...]:
        """Of embeddings `x [T, D]` the input `[T, P]` of each layer."""
        body: Any = self.model
        size = self.config.per_layer_size
        looked_up = body.embed_tokens_per_layer(batch.tokens, batch.mesh) * jnp.asarray(size**0.5, x.dtype)
        projected = body.per_layer_model_projection(x) * jnp.asarray(self.config.hidden_size**-0.5, x.dtype)
        projected, looked_up = (part.reshape(len(x), -1, size) for part in (projected, looked_up))
        both = body.per_layer_projection_norm(projected) + looked_up
        return tuple(jnp.unstack(both * jnp.asarray(2**-0.5, x.dtype), axis=1))


def weights(config: ModelConfig) -> ParamMapping:
    """Experts are stacked, gates and ups in one tensor. Files have keys and values of layers that read others'."""
    assert isinstance(config, Gemma4Config)
    size = config.expert_size

    def source(name: str) -> Source:
        match = STACKED.fullmatch(name)
        return Tensor(name) if match is None else packed(match[1], match[2], size)

    readers = (i for i, owner in enumerate(config.owners) if owner != i)
    unused = (rf"layers\.{i}\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\..*" for i in readers)
    return ParamMapping(source, ignored=(*IGNORED, *unused))


ARCHITECTURE = Architecture(parse, Gemma4ForCausalLM, weights, per_layer=True)
