"""The weights of a folder, in whichever format they are, and from there to the devices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
from jax.sharding import Mesh

from jaxinfer.checkpoint.folder import Checkpoint
from jaxinfer.checkpoint.load import load_params
from jaxinfer.checkpoint.memory import HugePages
from jaxinfer.checkpoint.orbax import Converted, is_converted, restore
from jaxinfer.checkpoint.remote import origin
from jaxinfer.models.model import AbstractModel, Params

Weights = Checkpoint | Converted


def open_weights(folder: Path) -> Weights:
    """What `jaxinfer convert` has written, or else safetensors files. Raises what these raise."""
    return Converted(folder, origin(folder)) if is_converted(folder) else Checkpoint(folder)


def load_weights(
    model: AbstractModel, weights: Weights, placement: jax.Device | Mesh, on_tensor: Callable[[int], None] | None = None
) -> Params:
    """All parameters of `model` on the device, or split over the mesh: see load_params and restore. `on_tensor` is
    told the bytes that were read."""
    if isinstance(weights, Checkpoint):
        return load_params(model, weights, placement, on_tensor)
    params = HugePages().moved(restore(model, weights, placement))
    if on_tensor is not None:
        on_tensor(weights.nbytes)
    return params
