"""A model without its weights: configuration, abstract parameters by name, and how to run it on given parameters."""

from __future__ import annotations

import logging
import math
import re
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

from jaxinfer.models.causal import CausalLM
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.registry import parse_config
from jaxinfer.models.weights import Source, WeightMap
from jaxinfer.quantization.qarray import Axes, QArray, axes_of_scales
from jaxinfer.quantization.schemes import NONE, SCALE, ZERO, Quantization, Scheme, scheme_of
from jaxinfer.quantization.stored import Format, Stored, asked_for, converted_quantization, stored_quantization
from jaxinfer.sharding import PADDED, counts, placed

log = logging.getLogger("jaxinfer")

Params = dict[str, jax.Array]  # by name in the checkpoint's spelling, "model.layers.0.mlp.up_proj.weight"


@dataclass(frozen=True)
class Model:
    """What derives from the one declaration of the weights in the modules.

    dtype: of activations, of the cache and of vectors; kept: of matrices that are not quantized. abstract: shape and
    dtype of each parameter by name; axes: its logical axes. tables: those of which rows are looked up. quantization: as
    it was asked for. quantized: the schemes of those weights that are: NAME has their values, NAME_scale their scales.
    together: how many places of each parameter's axes a mesh must not split. stored: how the checkpoint has those
    weights that are quantized in it; what no scheme holds exactly is converted to floats, and not in `quantized`.
    """

    config: ModelConfig
    weights: WeightMap
    dtype: np.dtype[Any]
    kept: np.dtype[Any]
    quantization: Quantization | None
    quantized: Mapping[str, Scheme]
    abstract: Mapping[str, jax.ShapeDtypeStruct]
    axes: Mapping[str, Axes]
    tables: frozenset[str]
    together: Mapping[str, tuple[int, ...]]
    stored: Mapping[str, Format]
    _graph: nnx.GraphDef[Any]
    _state: tuple[tuple[tuple[Any, ...], Any], ...]

    @classmethod
    def from_config(
        cls,
        data: Mapping[str, Any],
        dtype: DTypeLike,
        quantization: Quantization | None = None,
        kept: DTypeLike | None = None,
    ) -> Model:
        """Builds the module of a config.json's content abstractly: nothing is allocated. kept: None is `dtype`.
        Raises ValueError."""
        kept = jnp.dtype(dtype if kept is None else kept)
        architecture, config = parse_config(data)
        module = nnx.eval_shape(lambda: architecture.build(config, dtype=dtype, rngs=cast(nnx.Rngs, _OneKey())))
        graph, state = nnx.split(module)
        flat = tuple(nnx.to_flat_state(state))
        abstract: dict[str, jax.ShapeDtypeStruct] = {}
        axes: dict[str, Axes] = {}
        quantized: dict[str, Scheme] = {}
        stored: dict[str, Format] = {}
        left: dict[str, list[str]] = {}  # those that the scheme can't have, by why
        quantization, converted = asked_for(quantization, data), converted_quantization(data)
        if converted is not None and quantization not in (None, converted):
            raise ValueError(f"quantization is {quantization!r}: the checkpoint was converted, to {converted!r}")
        quantization = quantization if converted is None else converted
        said = stored_quantization(data) if converted is None else None
        weights = architecture.weights(config)
        tables = {_name(path) for path, variable in flat if variable.get_metadata().get("looked_up")}
        for path, variable in flat:
            name, shape, about = _name(path), variable.get_value(), variable.get_metadata()
            abstract[name], axes[name] = shape, about["axes"]
            looked_up = about.get("looked_up")
            if looked_up is not None:
                abstract[name] = jax.ShapeDtypeStruct(shape.shape, kept)
            scheme = None if looked_up is None else scheme_of(quantization, name, looked_up)
            if said is not None:
                form = _stored_format(said, weights.source(name)) if looked_up is False else None
                wanted, scheme = scheme, form.scheme(*shape.shape) if form else None
                if quantization is not None and wanted != scheme:
                    raise ValueError(
                        f"quantization is {quantization!r}: the checkpoint is quantized already ({said.method}), and "
                        f"{name} is in {scheme.name if scheme else 'floats'}: leave it out, or take the original "
                        "checkpoint"
                    )
                if form is not None:
                    stored[name] = form
            if scheme is None:
                continue
            try:
                arrays = scheme.arrays(*shape.shape)
            except ValueError as error:
                left.setdefault(str(error), []).append(name)
                continue
            quantized[name] = scheme
            for suffix, (size, kind) in arrays.items():
                abstract[name + suffix] = jax.ShapeDtypeStruct(size, jnp.dtype(kind))
            axes |= {name + suffix: axes_of_scales(axes[name], scheme) for suffix in scheme.beside}
        if quantization is not None and not quantized:
            why = f"; {next(iter(left))}" if left else ""
            raise ValueError(f"quantization is {quantization!r}: none of the model's weights is meant by it{why}")
        for why, names in left.items() if converted is None else ():
            which = ", ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
            log.warning("quantization is %r: %s is left in %s: %s", quantization, which, kept, why)
        together = _together(quantized, axes)
        held = quantized, abstract, axes, frozenset(tables), together, stored
        return cls(config, weights, jnp.dtype(dtype), kept, quantization, *held, graph, flat)

    @property
    def beside(self) -> set[str]:
        """The parameters that are not weights of their own: scales and zero points."""
        return {name + suffix for name, scheme in self.quantized.items() for suffix in scheme.beside}

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a weight, however its values are packed."""
        *rows, columns = self.abstract[name].shape
        return *rows, columns * (self.quantized[name].packed if name in self.quantized else 1)

    def placed(self, name: str, place: jax.Device | Mesh) -> Any:
        """A parameter's shape and dtype with its sharding, as `sharding.placed`. Raises ValueError if the mesh would
        split weights that have one scale."""
        scheme, axes = self.quantized.get(name), self.axes[name]
        blocks = zip(self.shape(name), counts(axes, place), scheme.block, strict=True) if scheme else ()
        for i, (size, count, unit) in enumerate(blocks):
            if axes[i] not in PADDED and count > 1 and size % (count * unit):
                fitting = ", ".join(str(n) for n in range(1, count) if size % (n * unit) == 0)
                raise ValueError(
                    f"{name}: its {size} {('outputs', 'inputs')[i]} would be split into {count} parts by the mesh, and "
                    f"{unit} have one scale; {scheme.name if scheme else NONE} allows {fitting or 'no'} parts"
                )
        return placed(self.abstract[name], axes, place, self.together[name])

    @property
    def precision(self) -> str:
        """The schemes that there are, and the dtype of the rest."""
        return ", ".join([*sorted({scheme.name for scheme in self.quantized.values()}), str(self.kept)])

    def bind(self, params: Mapping[str, Any]) -> CausalLM:
        """The module on these parameters, which may be those alone that are used; cheap enough only for tracing, so
        call it inside a jitted function."""

        def weight(name: str) -> Any:
            scheme = self.quantized.get(name)
            if name not in params or scheme is None:
                return params.get(name)
            zeros = params[name + ZERO] if scheme.zeros else None
            return QArray(params[name], params[scales(name)], scheme, self.axes[name], self.kept == jnp.bfloat16, zeros)

        flat = [(path, variable.replace(weight(_name(path)))) for path, variable in self._state]
        return cast(CausalLM, nnx.merge(self._graph, nnx.from_flat_state(flat)))

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


def _stored_format(said: Stored, source: Source) -> Format | None:
    found = said.format_of(source.name.removesuffix(".weight"), "Conv1D" if source.transpose else "Linear")
    if found is not None and source.transpose and found.layout != "gptq":
        raise ValueError(
            f"config.json: quantization_config.quant_method is {said.method!r}: {source.name} is stored [in, out], "
            "which is read with 'gptq' alone; take the original checkpoint"
        )
    return found


def _together(quantized: Mapping[str, Scheme], axes: Mapping[str, Axes]) -> dict[str, tuple[int, ...]]:
    """How many places of each parameter's axes belong together: what pads one weight pads those that it meets."""
    units: dict[str | None, int] = {}
    for name, scheme in quantized.items():
        for axis, unit in zip(axes[name], scheme.block, strict=True):
            units[axis] = math.lcm(units.get(axis, 1), unit)
    found = {name: tuple(units.get(axis, 1) for axis in of) for name, of in axes.items()}
    for name, scheme in quantized.items():
        rows, columns = found[name]
        found[name] = rows, columns // scheme.packed
        found |= {name + suffix: (rows // scheme.rows, columns // scheme.block[1]) for suffix in scheme.beside}
    return found


def scales(name: str) -> str:
    """Where a quantized weight's scales are among the parameters."""
    return name + SCALE


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in path)
