"""AFM (Arcee, 2025): Llama's attention, and an MLP without a gate whose activation is the square of ReLU (Primer,
arXiv:2109.08668)."""

from __future__ import annotations

from jaxinfer.models.config import ConfigReader
from jaxinfer.models.decoder import DecoderConfig, DecoderForCausalLM, UngatedLayer
from jaxinfer.models.llama import parse as parse_llama
from jaxinfer.models.llama import weights
from jaxinfer.models.registry import Architecture


class ArceeForCausalLM(DecoderForCausalLM):
    """AFM with its head."""

    layer = UngatedLayer


def parse(fields: ConfigReader) -> DecoderConfig:
    """Llama's, with other defaults."""
    return parse_llama(fields.with_defaults(hidden_act="relu2", rms_norm_eps=1e-5, max_position_embeddings=4096))


ARCHITECTURE = Architecture(parse, ArceeForCausalLM, weights)
