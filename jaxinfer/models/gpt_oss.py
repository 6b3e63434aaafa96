"""gpt-oss (OpenAI, arXiv:2508.10925): attention with sinks, in every other layer to a window, and experts whose gates
are cut off; all linears have biases."""

from __future__ import annotations

from jaxinfer.layers.mlp import ClampedSwiGLU
from jaxinfer.models.config import ConfigReader, ModelConfig, periodic_windows
from jaxinfer.models.decoder import IGNORED, decoder_config, num_layers, wide_rms_norm
from jaxinfer.models.moe import STACKED, MoeConfig, MoeForCausalLM, SparseLayer, moe_config, routing_of
from jaxinfer.models.registry import Architecture
from jaxinfer.models.sources import OneOf, Source, Strided, Tensor, Transposed
from jaxinfer.models.weights import ParamMapping

YARN = {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}


class GptOssLayer(SparseLayer):
    """Attention, then experts."""

    make_norm = staticmethod(wide_rms_norm)


class GptOssForCausalLM(MoeForCausalLM):
    """gpt-oss and its head."""

    layer = GptOssLayer
    norm = staticmethod(wide_rms_norm)


def parse(fields: ConfigReader) -> MoeConfig:
    """Without `rope_parameters` it is YaRN, by 32. `attention_bias` covers all four projections; `hidden_act` is not
    asked: experts have a gate of their own."""
    fields = fields.with_defaults(rope_theta=150000.0, max_position_embeddings=131072, intermediate_size=2880)
    fields = fields.with_absent(sliding_window=128, head_dim=64)
    if fields.data.get("rope_parameters") is None and fields.data.get("rope_scaling") is None:
        fields = fields.with_defaults(rope_parameters=YARN)
    bias = fields.boolean("attention_bias", True)
    layers = num_layers(fields)
    base = decoder_config(
        fields,
        windows=periodic_windows(fields, layers, 2),
        default_kv_heads=8,
        norm_eps=("rms_norm_eps", 1e-5),
        qkv_bias=bias,
        out_bias=bias,
        sinks=True,
    )
    return moe_config(
        base,
        routing=routing_of(fields, ("num_local_experts", 128), 4, among_chosen=True, linear_bias=True),
        expert_size=base.intermediate_size,
        expert_gating=ClampedSwiGLU(fields.number("swiglu_alpha", 1.702), fields.number("swiglu_limit", 7.0)),
        expert_bias=True,
        sparse=(True,) * layers,
    )


def source(name: str) -> Source:
    """Gates and ups take turns. Experts in mxfp4 are `[E, out, in]`, those in floats `[E, in, out]`, and MLX has all
    three apart."""
    if (match := STACKED.fullmatch(name)) is None:
        return Tensor(name.replace(".mlp.gate.", ".mlp.router."))
    experts, which, apart = match[1], match[2], Tensor(name)
    start = {"gate_proj": 0, "up_proj": 1}.get(which)
    stem = f"{experts}.down_proj" if start is None else f"{experts}.gate_up_proj"
    if name.endswith(".bias"):
        tensor = Tensor(f"{stem}_bias")
        return OneOf((tensor if start is None else Strided(tensor, start, 2, axis=1), apart))
    tensor = Tensor(stem)
    if start is None:
        return OneOf((Transposed(tensor), tensor, apart))
    return OneOf((Transposed(Strided(tensor, start, 2, axis=2)), Strided(tensor, start, 2, axis=1), apart))


def weights(config: ModelConfig) -> ParamMapping:
    """See source."""
    return ParamMapping(source, ignored=IGNORED)


ARCHITECTURE = Architecture(parse, GptOssForCausalLM, weights)
