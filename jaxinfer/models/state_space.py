"""What decoders with Mamba-2 share: their fields, and where its projections are."""

from __future__ import annotations

import math
from typing import Any, cast

from jaxinfer.layers.mamba2 import Mamba2Config
from jaxinfer.models.config import FULL, LINEAR, ConfigReader, ModelConfig
from jaxinfer.models.decoder import DecoderConfig
from jaxinfer.models.hybrid import part_of
from jaxinfer.models.sources import Source

CONTEXT = 2**20  # tokens of the longest sequences, where a model has no limit of its own
OLDER = {"mamba": LINEAR, "attention": FULL}  # kinds of layers, as transformers 4 has them
INFINITE = {"__float__": "Infinity"}  # as transformers 5 writes it
MAMBA2 = "z_proj", "x_proj", "bc_proj", "dt_proj"


def time_step_limits(fields: ConfigReader) -> tuple[float, float]:
    """`time_step_limit`: the upper one may be infinite, and is where nothing is said."""
    limits = fields.data.get("time_step_limit")
    if limits is None:
        return 0.0, math.inf
    if isinstance(limits, list | tuple):
        limits = [math.inf if limit == INFINITE else limit for limit in limits]
    numbers = isinstance(limits, list) and len(limits) == 2 and all(type(x) in (int, float) for x in limits)
    if not numbers or not 0 <= limits[0] <= limits[1]:
        raise fields.error("time_step_limit", "it must be two numbers, of at least 0, the smaller one first")
    return float(limits[0]), float(limits[1])


def mamba2_config(fields: ConfigReader, activation: str, inner: int | None = None, **more: Any) -> Mamba2Config:
    """Of the fields that hybrids have. inner: features of all heads together; None: `mamba_expand` times the model's
    width. more: see Mamba2Config."""
    heads = fields.integer("mamba_n_heads", 128)
    whole = fields.named("mamba_d_ssm")
    if inner is None:
        inner = fields.integer("mamba_expand", 2) * fields.integer("hidden_size")
        whole = f"mamba_expand * hidden_size, {inner}"
    auto = fields.data.get("mamba_d_head") in (None, "auto")
    size = inner // heads if auto else fields.integer("mamba_d_head")
    if size * heads != inner or not size:
        what = "it must divide" if auto else f"its product with mamba_d_head, {size}, must be"
        raise fields.error("mamba_n_heads", f"{what} {whole}")
    values: dict[str, Any] = {
        "heads": heads,
        "head_dim": size,
        "groups": groups_of(fields, "mamba_n_groups", 1, "mamba_n_heads", heads),
        "state_size": fields.integer("mamba_d_state", 256),
        "width": fields.integer("mamba_d_conv", 4, minimum=2),
        "activation": activation,
        "conv_bias": fields.boolean("mamba_conv_bias", True),
        "in_bias": fields.boolean("mamba_proj_bias", False),
        "out_bias": fields.boolean("mamba_proj_bias", False),
        "limits": time_step_limits(fields),
    }
    return Mamba2Config(**(values | more))


def groups_of(fields: ConfigReader, name: str, default: int, of: str, heads: int) -> int:
    """How many groups heads are in. of: the field that says how many heads there are."""
    groups = fields.integer(name, default)
    if heads % groups:
        raise fields.error(name, f"it must divide {fields.named(of)}")
    return groups


def mamba2_part(name: str, config: ModelConfig, mixer: str) -> Source | None:
    """See `part_of`."""
    own = next((m for m in cast(DecoderConfig, config).mixers if isinstance(m, Mamba2Config)), None)
    if own is None:
        return None
    inner, shared = own.heads * own.head_dim, 2 * own.groups * own.state_size
    return part_of(name, mixer, {"z": inner, "x": inner, "bc": shared, "dt": own.heads})
