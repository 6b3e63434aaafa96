"""Mamba (Gu and Dao, arXiv:2312.00752): state spaces alone."""

from __future__ import annotations

import math
from typing import Any, cast

from jaxinfer.layers.mamba import MambaConfig as MixerConfig
from jaxinfer.layers.mlp import ACTIVATIONS
from jaxinfer.models.config import ConfigReader, ModelConfig
from jaxinfer.models.decoder import DecoderConfig
from jaxinfer.models.hybrid import part_of
from jaxinfer.models.mamba2 import NAMES, MambaConfig, MambaForCausalLM, MambaLayer, mamba_config
from jaxinfer.models.registry import Architecture
from jaxinfer.models.sources import Source, Tensor
from jaxinfer.models.weights import ParamMapping, spelled

MAMBA = "in_proj", "z_proj"


class Mamba1Layer(MambaLayer):
    """A mixer behind a norm."""

    SMOOTHING_PAIRS = (("norm", tuple(f"mixer.{name}" for name in MAMBA)),)


class Mamba1ForCausalLM(MambaForCausalLM):
    """Mamba with its head."""

    layer = Mamba1Layer


def rank_of(fields: ConfigReader, name: str) -> int:
    """Of time steps: a sixteenth of the model's width where nothing is said."""
    auto = fields.data.get(name) in (None, "auto")
    return math.ceil(fields.integer("hidden_size") / 16) if auto else fields.integer(name)


def parse(fields: ConfigReader, **more: Any) -> MambaConfig:
    """It is `expand` times as wide inside. more: of its mixers, see there."""
    inner = fields.integer("expand", 2) * fields.integer("hidden_size")
    mixer = MixerConfig(
        inner=inner,
        state_size=fields.integer("state_size", 16),
        rank=rank_of(fields, "time_step_rank"),
        width=fields.integer("conv_kernel", 4, minimum=2),
        activation=fields.choice("hidden_act", "silu", tuple(ACTIVATIONS)),
        conv_bias=fields.boolean("use_conv_bias", True),
        bias=fields.boolean("use_bias", False),
        **more,
    )
    return mamba_config(fields, inner, mixer, tied=True)


def mamba_part(name: str, config: ModelConfig, mixer: str) -> Source | None:
    """See `part_of`."""
    own = next((m for m in cast(DecoderConfig, config).mixers if isinstance(m, MixerConfig)), None)
    return None if own is None else part_of(name, mixer, {"in": own.inner, "z": own.inner})


def weights(config: ModelConfig) -> ParamMapping:
    """Under names of its own."""

    def source(name: str) -> Source:
        own = spelled(name, NAMES)
        return mamba_part(own, config, "mixer") or Tensor(own)

    return ParamMapping(source, "backbone.", embedding="backbone.embeddings.weight")


ARCHITECTURE = Architecture(parse, Mamba1ForCausalLM, weights)
