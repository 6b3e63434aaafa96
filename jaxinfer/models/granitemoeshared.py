"""Granite with experts, and an MLP that all tokens take (IBM, 2025)."""

from __future__ import annotations

from functools import partial

from jaxinfer.models.granitemoe import GraniteMoeForCausalLM, parse, weights
from jaxinfer.models.registry import Architecture

ARCHITECTURE = Architecture(partial(parse, shared_experts=True), GraniteMoeForCausalLM, weights)
