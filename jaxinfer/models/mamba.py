"""Mamba (Gu and Dao, arXiv:2312.00752): state spaces alone."""

from __future__ import annotations

import math
import re
from typing import Any

from jaxinfer.layers.mamba import MambaConfig as MixerConfig
from jaxinfer.layers.mlp import ACTIVATIONS
from jaxinfer.models.config import ConfigReader, ModelConfig
from jaxinfer.models.mamba2 import NAMES, MambaConfig, MambaForCausalLM, MambaLayer, mamba_config
from jaxinfer.models.registry import Architecture
from jaxinfer.models.sources import Part, Source, Tensor
from jaxinfer.models.weights import ParamMapping, spelled

MAMBA = "in_proj", "z_proj"
_PROJECTION = re.compile(r"(.*)\.mixer\.(in|z)_proj\.(weight|bias)")


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


def mamba_part(name: str, inner: int, mixer: str) -> Source | None:
    """A projection of Mamba's, both of which are in one tensor; None of other weights. mixer: what the module's name is
    in checkpoints."""
    if (match := _PROJECTION.fullmatch(name)) is None:
        return None
    return Part(Tensor(f"{match[1]}.{mixer}.in_proj.{match[3]}"), inner if match[2] == "z" else 0, 2 * inner)


def weights(config: ModelConfig) -> ParamMapping:
    """Under names of its own."""

    def source(name: str) -> Source:
        own = spelled(name, NAMES)
        return mamba_part(own, config.num_heads, "mixer") or Tensor(own)

    return ParamMapping(source, "backbone.", embedding="backbone.embeddings.weight")


ARCHITECTURE = Architecture(parse, Mamba1ForCausalLM, weights)
