"""A model without its weights: configuration, abstract parameters by name, and how to run it on given parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxinfer.cache import KVCacheSpec
from jaxinfer.models.causal import CausalLM
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.params import ParamSpec, quantized
from jaxinfer.models.registry import parse_config
from jaxinfer.models.weights import ParamMapping
from jaxinfer.quantization.schemes import SCALE, Quantization, Scheme
from jaxinfer.quantization.stored import asked_for, converted_quantization, stored_quantization
from jaxinfer.weights import Axes

Params = dict[str, jax.Array]  # by name in the checkpoint's spelling, "model.layers.0.mlp.up_proj.weight"


@dataclass(frozen=True)
class AbstractModel:
    """What derives from the one declaration of the weights in the modules.

    config: of the architecture.
    weights: how checkpoints differ from the modules.
    dtype: of activations, of the cache and of vectors.
    weight_dtype: of weights that are not quantized.
    quantization: as it was asked for.
    built_in: its module is this package's own.
    params: a record of each weight, by name; NAME is the array that has its values, NAME_scale its scales.
    """

    config: ModelConfig
    weights: ParamMapping
    dtype: np.dtype[Any]
    weight_dtype: np.dtype[Any]
    quantization: Quantization | None
    built_in: bool
    params: Mapping[str, ParamSpec]
    _graph: nnx.GraphDef[Any]
    _state: tuple[tuple[tuple[Any, ...], Any], ...]

    @classmethod
    def from_config(
        cls,
        data: Mapping[str, Any],
        dtype: DTypeLike,
        quantization: Quantization | None = None,
        weight_dtype: DTypeLike | None = None,
        max_model_len: int | None = None,
    ) -> AbstractModel:
        """Builds the module of a config.json's content abstractly: nothing is allocated. weight_dtype: None is `dtype`.
        max_model_len: see `ModelConfig.for_length`. Raises ValueError."""
        weight_dtype = jnp.dtype(dtype if weight_dtype is None else weight_dtype)
        architecture, config = parse_config(data)
        config = config.for_length(max_model_len)
        module = nnx.eval_shape(lambda: architecture.build(config, dtype=dtype, rngs=cast(nnx.Rngs, _OneKey())))
        graph, state = nnx.split(module)
        flat = tuple(nnx.to_flat_state(state))
        quantization, converted = asked_for(quantization, data), converted_quantization(data)
        if converted is not None and quantization not in (None, converted):
            raise ValueError(f"quantization is {quantization!r}: the checkpoint was converted, to {converted!r}")
        quantization = quantization if converted is None else converted
        stored = stored_quantization(data) if converted is None else None
        weights = architecture.weights(config)
        specs = [_spec(path, variable, weights, weight_dtype) for path, variable in flat]
        specs = quantized(specs, quantization, stored, str(weight_dtype) if converted is None else "")
        params = {spec.name: spec for spec in specs}
        built_in = architecture.build.__module__.partition(".")[0] == __name__.partition(".")[0]
        return cls(config, weights, jnp.dtype(dtype), weight_dtype, quantization, built_in, params, graph, flat)

    @cached_property
    def arrays(self) -> dict[str, tuple[ParamSpec, str]]:
        """The arrays that parameters are kept as, by name: of which weight, and what is added to its name."""
        return {spec.name + suffix: (spec, suffix) for spec in self.params.values() for suffix in spec.arrays}

    @cached_property
    def abstract(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Their shapes and dtypes."""
        return {name: spec.arrays[suffix].abstract for name, (spec, suffix) in self.arrays.items()}

    @cached_property
    def nbytes(self) -> int:
        """Of all of them."""
        return sum(array.nbytes for spec in self.params.values() for array in spec.arrays.values())

    @cached_property
    def axes(self) -> dict[str, Axes]:
        """Their logical axes."""
        return {name: spec.arrays[suffix].axes for name, (spec, suffix) in self.arrays.items()}

    @cached_property
    def quantized(self) -> dict[str, Scheme]:
        """The schemes of those weights that are."""
        return {name: spec.scheme for name, spec in self.params.items() if spec.scheme is not None}

    def with_sharding(self, name: str, placement: jax.Device | Mesh) -> jax.ShapeDtypeStruct:
        """An array with its sharding: see ParamSpec."""
        spec, suffix = self.arrays[name]
        return spec.with_sharding(suffix, placement)

    @property
    def precision(self) -> str:
        """The schemes that there are, and the dtype of the rest."""
        return ", ".join([*sorted({scheme.name for scheme in self.quantized.values()}), str(self.weight_dtype)])

    def bind(self, params: Mapping[str, Any]) -> CausalLM:
        """The module on these parameters, which may be those alone that are used; cheap enough only for tracing, so
        call it inside a jitted function."""

        rounds = self.weight_dtype == jnp.bfloat16
        flat = [
            (path, variable.replace(self.params[_name(path)].bind(params, rounds))) for path, variable in self._state
        ]
        return cast(CausalLM, nnx.merge(self._graph, nnx.from_flat_state(flat)))

    @cached_property
    def cache_specs(self) -> tuple[KVCacheSpec | None, ...]:
        """What each layer keeps of a sequence."""
        return self.bind(self.abstract).cache_specs()

    @cached_property
    def head(self) -> frozenset[str]:
        """The parameters that logits are made with."""
        x = jax.ShapeDtypeStruct((1, self.config.hidden_size), self.dtype)
        traced = jax.make_jaxpr(lambda params, x: self.bind(params).logits(x))(dict(self.abstract), x).jaxpr
        used = {id(value) for equation in traced.eqns for value in equation.invars}
        return frozenset(
            name for name, value in zip(sorted(self.abstract), traced.invars[:-1], strict=True) if id(value) in used
        )

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


def _spec(path: tuple[Any, ...], variable: Any, weights: ParamMapping, weight_dtype: np.dtype[Any]) -> ParamSpec:
    """Of what a module declares."""
    name, value, about = _name(path), variable.get_value(), variable.get_metadata()
    is_embedding = about.get("is_embedding")
    dtype = jnp.dtype(value.dtype) if is_embedding is None else weight_dtype
    return ParamSpec(name, value.shape, dtype, about["axes"], is_embedding, weights.source(name))


def scales(name: str) -> str:
    """Where a quantized weight's scales are among the parameters."""
    return name + SCALE


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in path)
