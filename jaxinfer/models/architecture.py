"""What an architecture is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from flax import nnx
    from jax.typing import DTypeLike

    from jaxinfer.layers.classifier_config import ClassifierConfig
    from jaxinfer.models.body import Body
    from jaxinfer.models.config import ConfigReader, ModelConfig
    from jaxinfer.models.weights import ParamMapping


class Build(Protocol):
    """Makes the module of a configuration; under `nnx.eval_shape` nothing is allocated."""

    def __call__(self, config: Any, *, dtype: DTypeLike, rngs: nnx.Rngs) -> Body: ...


@dataclass(frozen=True)
class Architecture:
    """An architecture: config.json to configuration, configuration to module, module to checkpoint tensors.

    parse: reads and checks the fields.
    build: makes the module.
    weights: says how checkpoints differ from the module.
    per_layer: parse reads `per_layer_config`, which is refused of others.
    classifier: reads the head that gives a text's classes; None: decoders' own, see `tasks.last_token`.
    both_ways: makes a configuration of which tokens see what comes after them; None: there is none.
    """

    parse: Callable[[ConfigReader], ModelConfig]
    build: Build
    weights: Callable[[ModelConfig], ParamMapping]
    per_layer: bool = False
    classifier: Callable[[ConfigReader, ModelConfig], ClassifierConfig] | None = None
    both_ways: Callable[[Any], ModelConfig] | None = None
