"""The text model of Llama 4 (Meta, 2025).

Most layers have rotary positions, and attend within chunks of a sequence; the others have none, see all of it, and
queries that grow with their position. A token's share of an expert is a factor of what that takes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from flax import nnx
from jax.typing import DTypeLike

from jaxinfer.layers.attention import SelfAttention
from jaxinfer.layers.norm import RMSNorm
from jaxinfer.layers.temperature import Temperature
from jaxinfer.models.config import CHUNKED, ConfigReader, ModelConfig, layer_types_of, listed_layers
from jaxinfer.models.decoder import IGNORED, DecoderConfig, DecoderLayer, decoder_config, self_attention
from jaxinfer.models.moe import (
    STACKED,
    MoeConfig,
    MoeForCausalLM,
    SparseLayer,
    apart,
    moe_config,
    packed,
    routing_of,
)
from jaxinfer.models.registry import Architecture
from jaxinfer.models.smollm3 import turning_layers
from jaxinfer.models.sources import OneOf, Source, Tensor
from jaxinfer.models.weights import ParamMapping, spelled

DEFAULTS = {
    "vocab_size": 202048,
    "hidden_size": 5120,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
}
NAMES = {".mlp.gate.": ".feed_forward.router.", ".mlp.": ".feed_forward."}


def attention(config: DecoderConfig, layer: int, **options: Any) -> SelfAttention:
    """A layer's: turned queries and keys are divided by their root mean square, head by head, if they have norms."""
    normed = config.qk_norm and config.ropes[layer] is not None

    def norm(heads: int) -> RMSNorm:
        return RMSNorm(config.head_dim, eps=config.norm_eps, dtype=options["dtype"], scale=False)

    config = replace(config, qk_norm=False)
    return self_attention(config, layer, qk_norm=norm if normed else None, norm_after_rope=True, **options)


class Llama4DenseLayer(DecoderLayer):
    """With an MLP."""

    make_attention = staticmethod(attention)


class Llama4SparseLayer(SparseLayer):
    """With experts."""

    make_attention = staticmethod(attention)


def sparse_or_dense(config: MoeConfig, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> DecoderLayer:
    """A layer."""
    return (Llama4SparseLayer if config.sparse[layer] else Llama4DenseLayer)(config, layer, dtype=dtype, rngs=rngs)


class Llama4ForCausalLM(MoeForCausalLM):
    """Llama 4 with its head."""

    layer = staticmethod(sparse_or_dense)


def sparse_layers(fields: ConfigReader, layers: int) -> tuple[bool, ...]:
    """Those in `moe_layers` have experts, or else each `interleave_moe_layer_step`-th."""
    listed = listed_layers(fields, "moe_layers", layers)
    if listed is None:
        step = fields.integer("interleave_moe_layer_step", 1)
        return tuple((i + 1) % step == 0 for i in range(layers))
    return tuple(i in listed for i in range(layers))


def chunks(fields: ConfigReader, turning: list[bool]) -> tuple[int | None, ...]:
    """Layers with rotary positions have them, if there is a size; `layer_types` overrides which."""
    none = "attention_chunk_size" in fields.data and fields.data["attention_chunk_size"] is None
    size = None if none else fields.integer("attention_chunk_size", 8192)
    types = layer_types_of(fields, len(turning), lambda i: none or not turning[i], other=CHUNKED)
    if none and CHUNKED in types:
        raise fields.error("attention_chunk_size", f"some layers have {CHUNKED}; it must be an integer, or absent")
    return tuple(size if kind == CHUNKED else None for kind in types)


def temperature(fields: ConfigReader) -> Temperature | None:
    """Of layers without rotary positions. Files of 2025 say 4 for true, which was the default."""
    if fields.data.get("attn_temperature_tuning") != 4 and not fields.boolean("attn_temperature_tuning", True):
        return None
    return Temperature(fields.number("attn_scale", 0.1, above=False), fields.integer("floor_scale", 8192), ahead=1)


def parse(fields: ConfigReader) -> MoeConfig:
    """`attention_bias` covers all four projections; `intermediate_size` is the width of experts, also of the one that
    all tokens take. An empty `no_rope_layers` says nothing."""
    fields = fields.with_defaults(**DEFAULTS)
    if fields.data.get("no_rope_layers") == []:
        fields = ConfigReader({**fields.data, "no_rope_layers": None}, fields.where)
    turning, tempered = turning_layers(fields), temperature(fields)
    bias, size = fields.boolean("attention_bias", False), fields.integer("intermediate_size")
    base = decoder_config(
        fields,
        default_kv_heads=8,
        default_head_dim=128,
        norm_eps=("rms_norm_eps", 1e-5),
        interleaved=True,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=fields.boolean("use_qk_norm", True),
        chunks=chunks(fields, turning),
        temperatures=tuple(None if turns else tempered for turns in turning),
    )
    base = replace(
        base,
        intermediate_size=fields.integer("intermediate_size_mlp"),
        ropes=tuple(rope if turns else None for rope, turns in zip(base.ropes, turning, strict=True)),
    )
    return moe_config(
        base,
        routing=routing_of(fields, ("num_local_experts", 16), 1, scores="sigmoid", among_chosen=True, of_inputs=True),
        expert_size=size,
        sparse=sparse_layers(fields, base.num_layers),
        shared_size=size,
    )


def weights(config: ModelConfig) -> ParamMapping:
    """Names are others, and experts are packed, `[E, in, out]`; one by one where they are quantized."""
    moe = cast(MoeConfig, config)

    def source(name: str) -> Source:
        name = spelled(name, NAMES)
        if (match := STACKED.fullmatch(name)) is None:
            return Tensor(name)
        experts, which = match[1], match[2]
        return OneOf((packed(experts, which, moe.expert_size, True), apart(experts, which, moe.routing.experts)))

    return ParamMapping(source, ignored=IGNORED)


ARCHITECTURE = Architecture(parse, Llama4ForCausalLM, weights)
