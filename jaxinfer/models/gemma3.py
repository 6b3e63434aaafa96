"""Gemma 3, its text model (Google, arXiv:2503.19786): Gemma 2's layer with norms on queries and keys instead of a cap
on scores, five windows to one full layer, and a rotary embedding for each of the two."""

from __future__ import annotations

from dataclasses import replace

from jaxinfer.models.config import FULL, SLIDING, ConfigReader, layer_types_of, typed_rope
from jaxinfer.models.decoder import DecoderConfig, num_layers
from jaxinfer.models.gemma2 import DEFAULTS as GEMMA2
from jaxinfer.models.gemma2 import Gemma2ForCausalLM, cap, gemma2_config
from jaxinfer.models.llama import weights
from jaxinfer.models.registry import Architecture

DEFAULTS = GEMMA2 | {"vocab_size": 262208, "max_position_embeddings": 131072}
THETAS = {FULL: ("rope_theta", 1e6), SLIDING: ("rope_local_base_freq", 1e4)}


def parse(fields: ConfigReader) -> DecoderConfig:
    """Of `sliding_window_pattern` layers the last one is full."""
    fields.refuse("attn_logit_softcapping")
    fields = fields.with_defaults(**DEFAULTS)
    pattern = fields.integer("sliding_window_pattern", 6)
    types = layer_types_of(fields, num_layers(fields), lambda i: (i + 1) % pattern == 0)
    # `rope_scaling` is that of full layers.
    of_type = {FULL: fields, SLIDING: ConfigReader({**fields.data, "rope_scaling": None}, fields.where)}
    head_dim = fields.integer("head_dim")
    typed = {kind: typed_rope(of_type[kind], kind, theta, head_dim) for kind, theta in THETAS.items()}
    return gemma2_config(
        fields,
        types,
        ropes=tuple(typed[layer_type][0] for layer_type in types),
        max_context=min(context for _, context in typed.values()),
        qk_norm=True,
        logit_soft_cap=cap(fields, "final_logit_softcapping", None),
    )


def both_ways(config: DecoderConfig) -> DecoderConfig:
    """EmbeddingGemma's (arXiv:2509.20354): a window reaches half as far to each side, both ends of it included."""
    windows = tuple(window and window // 2 + 1 for window in config.windows)
    return replace(config, causal=False, windows=windows)


ARCHITECTURE = Architecture(parse, Gemma2ForCausalLM, weights, both_ways=both_ways)
