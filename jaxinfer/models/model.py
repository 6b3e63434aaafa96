"""A model without its weights: configuration, abstract parameters by name, and how to run it on given parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from jaxinfer.layers.linear import Axes
from jaxinfer.models.causal import CausalLM
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.registry import parse_config
from jaxinfer.models.weights import WeightMap
from jaxinfer.quantization.qarray import QArray, axes_of_scales
from jaxinfer.quantization.schemes import Quantization, Scheme, scheme_of

Params = dict[str, jax.Array]  # by name in the checkpoint's spelling, "model.layers.0.mlp.up_proj.weight"


@dataclass(frozen=True)
class Model:
    """What derives from the one declaration of the weights in the modules.

    dtype: of activations, of the cache, and of what is not quantized. abstract: shape and dtype of each parameter by
    name; axes: its logical axes. tables: those of which rows are looked up. quantization: as it was asked for.
    quantized: the schemes of those weights that are: NAME has their values, NAME_scale their scales.
    """

    config: ModelConfig
    weights: WeightMap
    dtype: np.dtype[Any]
    quantization: Quantization | None
    quantized: Mapping[str, Scheme]
    abstract: Mapping[str, jax.ShapeDtypeStruct]
    axes: Mapping[str, Axes]
    tables: frozenset[str]
    _graph: nnx.GraphDef[Any]
    _state: tuple[tuple[tuple[Any, ...], Any], ...]

    @classmethod
    def from_config(cls, data: Mapping[str, Any], dtype: DTypeLike, quantization: Quantization | None = None) -> Model:
        """Builds the module of a config.json's content abstractly: nothing is allocated. Raises ValueError."""
        architecture, config = parse_config(data)
        module = nnx.eval_shape(lambda: architecture.build(config, dtype=dtype, rngs=cast(nnx.Rngs, _OneKey())))
        graph, state = nnx.split(module)
        flat = tuple(nnx.to_flat_state(state))
        abstract: dict[str, jax.ShapeDtypeStruct] = {}
        axes: dict[str, Axes] = {}
        quantized: dict[str, Scheme] = {}
        tables = {_name(path) for path, variable in flat if variable.get_metadata().get("looked_up")}
        for path, variable in flat:
            name, shape, about = _name(path), variable.get_value(), variable.get_metadata()
            abstract[name], axes[name] = shape, about["axes"]
            looked_up = about.get("looked_up")
            scheme = None if looked_up is None else scheme_of(quantization, name, looked_up)
            if scheme is not None:
                quantized[name] = scheme
                abstract[name] = jax.ShapeDtypeStruct(shape.shape, jnp.dtype(scheme.values))
                abstract[scales(name)] = jax.ShapeDtypeStruct((shape.shape[0], 1), jnp.dtype("float32"))
                axes[scales(name)] = axes_of_scales(axes[name])
        if quantization is not None and not quantized:
            raise ValueError(f"quantization is {quantization!r}: none of the model's weights is meant by it")
        weights = architecture.weights(config)
        return cls(
            config, weights, jnp.dtype(dtype), quantization, quantized, abstract, axes, frozenset(tables), graph, flat
        )

    def bind(self, params: Mapping[str, Any]) -> CausalLM:
        """The module on these parameters; cheap enough only for tracing, so call it inside a jitted function."""

        def weight(name: str) -> Any:
            scheme = self.quantized.get(name)
            return params[name] if scheme is None else QArray(params[name], params[scales(name)], scheme)

        flat = [(path, variable.replace(weight(_name(path)))) for path, variable in self._state]
        return cast(CausalLM, nnx.merge(self._graph, nnx.from_flat_state(flat)))

    def random_params(self, seed: int = 0) -> Params:
        """Weights as the modules initialize them: matrices normal with deviation 0.02, norms one, biases zero; not for
        quantized models."""
        assert not self.quantized

        def init() -> Params:
            params: Params = {}
            for i, (name, shape) in enumerate(sorted(self.abstract.items())):
                if len(shape.shape) > 1:
                    key = jax.random.fold_in(jax.random.key(seed), i)
                    params[name] = (0.02 * jax.random.normal(key, shape.shape)).astype(shape.dtype)
                else:
                    params[name] = jax.numpy.full(shape.shape, 0 if name.endswith("bias") else 1, shape.dtype)
            return params

        return jax.jit(init)()


class _OneKey:
    """In place of nnx.Rngs where no value is ever computed: its counter takes time with the square of the calls."""

    def __init__(self) -> None:
        self._key = jax.random.key(0)

    def params(self) -> jax.Array:
        return self._key


def scales(name: str) -> str:
    """Where a quantized weight's scales are among the parameters; compressed-tensors calls them so, too."""
    return f"{name}_scale"


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in path)
