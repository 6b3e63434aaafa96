"""LFM2 (Liquid AI, arXiv:2511.23404): in most layers a gated short convolution, in the others attention with normed
queries and keys."""

from __future__ import annotations

from typing import Any

from jaxinfer.layers.short_convolution import ShortConvolutionConfig
from jaxinfer.models.config import FULL, LARGEST, ConfigReader, ModelConfig, layer_types_of, listed_layers
from jaxinfer.models.decoder import IGNORED, DecoderConfig, DecoderForCausalLM, decoder_config, num_layers
from jaxinfer.models.hybrid import MixerLayer, hybrid, part_of, smoothing_pairs
from jaxinfer.models.registry import Architecture
from jaxinfer.models.sources import Source, Tensor
from jaxinfer.models.weights import ParamMapping, spelled

CONV = "conv"  # in layer_types
NAMES = {
    "input_layernorm": "operator_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.norm": "model.embedding_norm",
    "self_attn.o_proj": "self_attn.out_proj",
    "self_attn.q_norm": "self_attn.q_layernorm",
    "self_attn.k_norm": "self_attn.k_layernorm",
    ".mixer.": ".conv.",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}


class ConvolutionLayer(MixerLayer):
    """A short convolution, then an MLP."""

    SMOOTHING_PAIRS = smoothing_pairs("b_proj", "c_proj", "x_proj")


class Lfm2ForCausalLM(DecoderForCausalLM):
    """LFM2 with its head."""

    layer = staticmethod(hybrid(ConvolutionLayer))


def convolution_config(fields: ConfigReader, types: tuple[str, ...], **more: Any) -> DecoderConfig:
    """Of a decoder with short convolutions in those layers. more: see `decoder_config`."""
    convolution = ShortConvolutionConfig(
        fields.integer("conv_L_cache", 3, minimum=2), fields.boolean("conv_bias", False)
    )
    tied = "tie_embedding" if "tie_embedding" in fields.data else "tie_word_embeddings"
    fields = fields.with_values(tie_word_embeddings=fields.boolean(tied, True), hidden_act="silu")
    return decoder_config(
        fields.with_defaults(max_position_embeddings=128000, rope_theta=1e6),
        default_kv_heads=8,
        norm_eps=("norm_eps", 1e-5),
        qk_norm=True,
        mixers=tuple(convolution if kind == CONV else None for kind in types),
        **more,
    )


def parse(fields: ConfigReader) -> DecoderConfig:
    """Layers attend that `layer_types` or `full_attn_idxs` names, or all. MLPs are as wide as two thirds of what the
    file says, times a factor, and rounded up, unless it says that they are not."""
    layers = num_layers(fields)
    attend = listed_layers(fields, "full_attn_idxs", layers)
    types = layer_types_of(fields, layers, lambda i: attend is None or i in attend, CONV)
    if attend is not None and {*attend} != (full := {i for i, kind in enumerate(types) if kind == FULL}):
        raise fields.error("full_attn_idxs", f"layer_types says that {sorted(full)} attend; remove one of the two")
    width = fields.integer(
        "block_ff_dim" if fields.data.get("block_ff_dim") is not None else "intermediate_size", 12288
    )
    if fields.boolean("block_auto_adjust_ff_dim", True):
        width = int(2 * width / 3)
        if fields.data.get("block_ffn_dim_multiplier", 1.0) is not None:
            multiple = fields.integer("block_multiple_of", 256)
            width = -(-int(fields.number("block_ffn_dim_multiplier", 1.0) * width) // multiple) * multiple
            if width > LARGEST:
                raise fields.error("block_ffn_dim_multiplier", f"MLPs would be {width} wide, and more than {LARGEST}")
    return convolution_config(fields.with_values(intermediate_size=width), types)


def convolution_part(name: str, config: ModelConfig) -> Source | None:
    """See `part_of`."""
    return part_of(name, "conv", dict.fromkeys("bcx", config.hidden_size))


def weights(config: ModelConfig) -> ParamMapping:
    """Under names of its own."""

    def source(name: str) -> Source:
        return convolution_part(name, config) or Tensor(spelled(name, NAMES))

    return ParamMapping(source, ignored=IGNORED)


ARCHITECTURE = Architecture(parse, Lfm2ForCausalLM, weights)
