"""Falcon Mamba 7B (TII, arXiv:2410.05355): Mamba, whose time steps, B and C are normed without weights."""

from __future__ import annotations

from jaxinfer.models.config import ConfigReader
from jaxinfer.models.mamba import Mamba1ForCausalLM, weights
from jaxinfer.models.mamba import parse as parse_mamba
from jaxinfer.models.mamba2 import MambaConfig
from jaxinfer.models.registry import Architecture


def parse(fields: ConfigReader) -> MambaConfig:
    """`mixer_rms_eps` is of those norms."""
    return parse_mamba(fields, norm_eps=fields.number("mixer_rms_eps", 1e-6))


ARCHITECTURE = Architecture(parse, Mamba1ForCausalLM, weights)
