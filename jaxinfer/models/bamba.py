"""Bamba 9B (IBM, Princeton, CMU and UIUC, 2024): Mamba-2 in most layers, in the others attention of which half of each
head turns."""

from __future__ import annotations

from dataclasses import replace

from jaxinfer.models.config import ConfigReader, ModelConfig, listed_layers
from jaxinfer.models.decoder import IGNORED, DecoderConfig, DecoderForCausalLM, decoder_config
from jaxinfer.models.hybrid import MixerLayer, hybrid, smoothing_pairs
from jaxinfer.models.registry import Architecture
from jaxinfer.models.sources import Source, Tensor
from jaxinfer.models.state_space import MAMBA2, mamba2_config, mamba2_part
from jaxinfer.models.weights import ParamMapping, spelled

NAMES = {
    "post_attention_layernorm": "pre_ff_layernorm",
    ".mlp.": ".feed_forward.",
    ".mixer.": ".mamba.",
    "model.norm.": "model.final_layernorm.",
}


class Mamba2Layer(MixerLayer):
    """Mamba-2, then an MLP."""

    SMOOTHING_PAIRS = smoothing_pairs(*MAMBA2)


class BambaForCausalLM(DecoderForCausalLM):
    """Bamba with its head."""

    layer = staticmethod(hybrid(Mamba2Layer))


def parse(fields: ConfigReader) -> DecoderConfig:
    """Layers in `attn_layer_indices` attend. `attention_bias` covers all four projections."""
    bias = fields.boolean("attention_bias", False)
    # Whatever the file says outside of its settings of positions, transformers takes half.
    base = decoder_config(
        fields.with_values(partial_rotary_factor=None).with_defaults(max_position_embeddings=262144),
        default_kv_heads=8,
        default_partial=0.5,
        norm_eps=("rms_norm_eps", 1e-5),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=fields.boolean("mlp_bias", False),
    )
    attend = listed_layers(fields, "attn_layer_indices", base.num_layers) or ()
    mixer = mamba2_config(fields, base.activation)
    return replace(base, mixers=tuple(None if i in attend else mixer for i in range(base.num_layers)))


def weights(config: ModelConfig) -> ParamMapping:
    """Under names of its own."""

    def source(name: str) -> Source:
        return mamba2_part(name, config, "mamba") or Tensor(spelled(name, NAMES))

    return ParamMapping(source, ignored=IGNORED)


ARCHITECTURE = Architecture(parse, BambaForCausalLM, weights)
