"""The weights of a folder, in whichever format they are, and from there to the devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxinfer.checkpoint.folder import Checkpoint
from jaxinfer.checkpoint.load import load_params
from jaxinfer.checkpoint.memory import HugePages
from jaxinfer.checkpoint.orbax import Converted, is_converted, restore
from jaxinfer.checkpoint.remote import origin
from jaxinfer.models.model import AbstractModel, Params
from jaxinfer.models.registry import parse_config

Weights = Checkpoint | Converted


def open_weights(folder: Path) -> Weights:
    """What `jaxinfer convert` has written, or else files of safetensors or torch. Raises what these raise."""
    return Converted(folder, origin(folder)) if is_converted(folder) else Checkpoint(folder)


def load_weights(
    model: AbstractModel, weights: Weights, placement: jax.Device | Mesh, on_array: Callable[[int], None] | None = None
) -> Params:
    """All parameters of `model` on the device, or split over the mesh: see load_params and restore. `on_array` is
    told the bytes that are there, `model.nbytes` in all."""
    if isinstance(weights, Checkpoint):
        return load_params(model, weights, placement, on_array)
    params = HugePages().moved(restore(model, weights, placement))
    if on_array is not None:
        on_array(model.nbytes)
    return params


def dtypes_of(config: Mapping[str, Any], weights: Weights) -> dict[str, np.dtype[Any]]:
    """Those of the tensors of this config.json's model, by name: not of parts beside it, and of what it has no use for.
    Raises ValueError."""
    architecture, parsed = parse_config(config)
    names = architecture.weights(parsed)
    return {name: info.dtype for name, info in weights.tensors.items() if not names.is_ignored(name)}
