"""A model without its weights: configuration, abstract parameters by name, and how to run it on given parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike

from jaxinfer.cache import KVCacheSpec
from jaxinfer.models import registry
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.declared import Declarations, Declared, DeclaredModule
from jaxinfer.models.params import ParamSpec, quantized
from jaxinfer.models.tasks import GENERATE, wanted_task
from jaxinfer.models.weights import ParamMapping
from jaxinfer.quantization.schemes import SCALE, Quantization, Scheme
from jaxinfer.quantization.stored import asked_for, converted_quantization, stored_quantization
from jaxinfer.weights import Adapted, Axes, LowRank

if TYPE_CHECKING:  # a start whose programs are there builds no module
    from jaxinfer.models.causal import CausalLM

Params = dict[str, jax.Array]  # by name in the checkpoint's spelling, "model.layers.0.mlp.up_proj.weight"


Module = tuple[Any, tuple[tuple[tuple[Any, ...], Any], ...]]  # what Flax makes of one: its graph, its variables by path


@dataclass(frozen=True)
class AbstractModel:
    """What derives from the one declaration of the weights in the modules.

    declared, declared_module: what the architecture makes of config.json.
    dtype: of activations and of vectors.
    weight_dtype: of weights that are not quantized, and of keys and values unless asked otherwise.
    quantization: as it was asked for.
    params: a record of each weight, by name; NAME is the array that has its values, NAME_scale its scales.
    """

    declared: Declared
    declared_module: DeclaredModule
    dtype: np.dtype[Any]
    weight_dtype: np.dtype[Any]
    quantization: Quantization | None
    params: Mapping[str, ParamSpec]
    _module: Callable[[], Module]

    @classmethod
    def from_config(
        cls,
        data: Mapping[str, Any],
        dtype: DTypeLike,
        quantization: Quantization | None = None,
        weight_dtype: DTypeLike | None = None,
        max_model_len: int | None = None,
        declarations: Declarations | None = None,
    ) -> AbstractModel:
        """Of a config.json's content: the module is built abstractly, nothing is allocated. weight_dtype: None is
        `dtype`; max_model_len: see `ModelConfig.for_length`; declarations: of earlier starts. Raises ValueError."""
        declarations, dtype = declarations or Declarations(), jnp.dtype(dtype)
        weight_dtype = dtype if weight_dtype is None else jnp.dtype(weight_dtype)
        of = data, max_model_len
        declared, module = declarations.config(*of), cache(lambda: _build(*of, dtype))
        quantization, converted = asked_for(quantization, data), converted_quantization(data)
        if converted is not None and quantization not in (None, converted):
            raise ValueError(f"quantization is {quantization!r}: the checkpoint was converted, to {converted!r}")
        quantization = quantization if converted is None else converted
        stored = stored_quantization(data) if converted is None else None
        kept = declarations.module(
            declared, *of, (dtype, weight_dtype), lambda: _declare(*of, module(), dtype, weight_dtype)
        )
        specs = quantized(kept.params, quantization, stored, str(weight_dtype) if converted is None else "")
        return cls(declared, kept, dtype, weight_dtype, quantization, {spec.name: spec for spec in specs}, module)

    @property
    def config(self) -> ModelConfig:
        return self.declared.config

    @property
    def weights(self) -> ParamMapping:
        """How checkpoints differ from the module."""
        return self.declared.weights

    @property
    def built_in(self) -> bool:
        """Its module is this package's own."""
        return self.declared.built_in

    @property
    def cache_specs(self) -> tuple[KVCacheSpec | None, ...]:
        """What each layer keeps of a sequence."""
        return self.declared_module.cache_specs

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

    def bind(
        self, params: Mapping[str, Any], adapters: Mapping[str, LowRank] | None = None, slot: jax.Array | None = None
    ) -> CausalLM:
        """The module on these parameters, which may be those alone that are used; cheap enough only for tracing, so
        call it inside a jitted function. Of a model that makes no text (see `tasks`) it is a Body, and no more.

        adapters: what they do to weights, by name. slot: i32[T], whose the tokens are that go through the layers."""
        rounds, beside = self.weight_dtype == jnp.bfloat16, adapters or {}
        table, head = self.vocabulary

        def value(name: str) -> Any:
            weight: Any = self.params[name].bind(params, rounds)
            if slot is None or weight is None:
                return weight
            if name == table:  # which is the head, too, where there is no other
                products = None if head in self.params else beside.get(head)
                rows = beside.get(table)
                return Adapted(weight, slot, products, rows) if products or rows else weight
            return Adapted(weight, slot, beside[name]) if name in beside else weight

        return _bind(self._module(), value)

    @cached_property
    def adaptable(self) -> dict[str, ParamSpec]:
        """The weights that adapters may change: the layers' matrices, experts', the table, and the head, which may be
        that."""
        specs = {
            name: spec
            for name, spec in self.params.items()
            if spec.is_embedding is False and name not in self.declared_module.head
        }
        table, head = self.vocabulary
        return specs | {table: self.params[table], head: self.params.get(head, self.params[table])}

    @cached_property
    def vocabulary(self) -> tuple[str, str]:
        """The names of the table and of the head; of a head that is the table, its name in a checkpoint."""

        def own(tensor: str) -> str:
            specs = self.params.items()
            return next((name for name, spec in specs if tensor in spec.source.tensors(spec.shape)), tensor)

        return own(self.weights.embedding), own(self.weights.head)

    @cached_property
    def head(self) -> frozenset[str]:
        """The parameters that logits are made with."""
        weights = set(self.declared_module.head)
        return frozenset(name for name, (spec, _) in self.arrays.items() if spec.name in weights)

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


def _build(data: Mapping[str, Any], max_model_len: int | None, dtype: np.dtype[Any]) -> Module:
    from flax import nnx

    architecture, config = registry.parse_config(data)
    config = config.for_length(max_model_len)
    # Flax gives variables shardings where there is a mesh, and takes them all for arrays.
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
        module = nnx.eval_shape(lambda: architecture.build(config, dtype=dtype, rngs=cast(nnx.Rngs, _OneKey())))
    graph, state = nnx.split(module)
    return graph, tuple(nnx.to_flat_state(state))


def _bind(module: Module, value: Callable[[str], Any]) -> CausalLM:
    """The module with these values of its variables."""
    from flax import nnx

    graph, variables = module
    flat = [(path, variable.replace(value(_name(path)))) for path, variable in variables]
    return cast("CausalLM", nnx.merge(graph, nnx.from_flat_state(flat)))


def _declare(
    data: Mapping[str, Any],
    max_model_len: int | None,
    module: Module,
    dtype: np.dtype[Any],
    weight_dtype: np.dtype[Any],
) -> DeclaredModule:
    """What a module says of itself."""
    architecture, config = registry.parse_config(data)
    weights = architecture.weights(config.for_length(max_model_len))
    specs = {_name(path): _spec(_name(path), variable, weights, weight_dtype) for path, variable in module[1]}
    if wanted_task(data) != GENERATE:
        return DeclaredModule(tuple(specs.values()), (), ())
    values = {name: spec.arrays[""].abstract for name, spec in specs.items()}

    def bound(params: Mapping[str, Any]) -> CausalLM:
        return _bind(module, lambda name: specs[name].bind(params, False))

    x = jax.ShapeDtypeStruct((1, config.hidden_size), dtype)
    traced = jax.make_jaxpr(lambda params, x: bound(params).logits(x))(values, x).jaxpr
    used = {id(value) for equation in traced.eqns for value in equation.invars}
    head = [name for name, value in zip(sorted(values), traced.invars[:-1], strict=True) if id(value) in used]
    return DeclaredModule(tuple(specs.values()), bound(values).cache_specs(), tuple(head))


def _spec(name: str, variable: Any, weights: ParamMapping, weight_dtype: np.dtype[Any]) -> ParamSpec:
    """Of what a module declares."""
    value, about = variable.get_value(), variable.get_metadata()
    is_embedding = about.get("is_embedding")
    dtype = jnp.dtype(value.dtype) if is_embedding is None else weight_dtype
    return ParamSpec(name, value.shape, dtype, about["axes"], is_embedding, weights.source(name))


def scales(name: str) -> str:
    """Where a quantized weight's scales are among the parameters."""
    return name + SCALE


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in path)
