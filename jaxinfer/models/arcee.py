"""AFM (Arcee, 2025): Llama's attention, and an MLP without a gate whose activation is the square of ReLU (Primer,
arXiv:2109.08668)."""

from __future__ import annotations

from jaxinfer.models.causal import SmoothingPairs
from jaxinfer.models.config import ConfigReader
from jaxinfer.models.decoder import DecoderConfig, DecoderForCausalLM, DecoderLayer, plain_mlp
from jaxinfer.models.llama import parse as parse_llama
from jaxinfer.models.llama import weights
from jaxinfer.models.registry import Architecture


class ArceeLayer(DecoderLayer):
    """Nothing is a channel's factor of what the activation is made of."""

    SMOOTHING_PAIRS: SmoothingPairs = (
        ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("self_attn.v_proj", ("self_attn.o_proj",)),
        ("post_attention_layernorm", ("mlp.up_proj",)),
    )
    make_mlp = staticmethod(plain_mlp)


class ArceeForCausalLM(DecoderForCausalLM):
    """AFM with its head."""

    layer = ArceeLayer


def parse(fields: ConfigReader) -> DecoderConfig:
    """Llama's, with other defaults."""
    return parse_llama(fields.with_defaults(hidden_act="relu2", rms_norm_eps=1e-5, max_position_embeddings=4096))


ARCHITECTURE = Architecture(parse, ArceeForCausalLM, weights)
