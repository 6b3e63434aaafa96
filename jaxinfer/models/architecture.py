"""What an architecture is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from flax import nnx
    from jax.typing import DTypeLike

    from jaxinfer.models.causal import CausalLM
    from jaxinfer.models.config import ConfigReader, ModelConfig
    from jaxinfer.models.weights import ParamMapping


class Build(Protocol):
    """Makes the module of a configuration; under `nnx.eval_shape` nothing is allocated."""

    def __call__(self, config: Any, *, dtype: DTypeLike, rngs: nnx.Rngs) -> CausalLM: ...


@dataclass(frozen=True)
class Architecture:
    """An architecture: config.json to configuration, configuration to module, module to checkpoint tensors.

    parse: reads and checks the fields.
    build: makes the module.
    weights: says how checkpoints differ from the module.
    per_layer: parse reads `per_layer_config`, which is refused of others.
    """

    parse: Callable[[ConfigReader], ModelConfig]
    build: Build
    weights: Callable[[ModelConfig], ParamMapping]
    per_layer: bool = False
