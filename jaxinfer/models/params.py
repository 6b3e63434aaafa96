"""One record for each weight of a model: what it is, how it is kept, and where a checkpoint has it."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxinfer.models.sources import Source, whole
from jaxinfer.quantization.schemes import BIAS, NONE, SCALE, ZERO, Quantization, Scheme, scheme_of
from jaxinfer.quantization.stored import MLX, STACKED, Format, Stored
from jaxinfer.sharding import PADDED, counts, with_sharding
from jaxinfer.weights import Axes, Dense, QArray, Weight
from jaxinfer.weights.quantized import axes_of_scales

log = logging.getLogger("jaxinfer")


class ArraySpec(NamedTuple):
    """One of the arrays of a weight.

    shape, dtype: its own.
    axes: logical, one for each of the shape.
    multiples: how many places of each axis a mesh must not split.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    axes: Axes
    multiples: tuple[int, ...]

    @property
    def abstract(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.shape, self.dtype)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class ParamSpec:
    """A weight `[..., out, in]`, or another parameter.

    name: its path in the module, and in a checkpoint where nothing else is said.
    shape: in full, however it is packed.
    dtype: of floats.
    axes: logical, one for each of the shape.
    is_embedding: whether rows of it are looked up; None of what is no weight that products take.
    source: the checkpoint's tensors.
    scheme: of one that is quantized.
    stored: how the checkpoint has it, where that is quantized already; what no scheme holds exactly becomes floats.
    elsewhere: where a checkpoint may have it instead, each with how it is stored there.
    multiples: how many places of each axis a mesh must not split.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    axes: Axes
    is_embedding: bool | None
    source: Source
    scheme: Scheme | None = None
    stored: Format | None = None
    elsewhere: tuple[tuple[Source, Format | None], ...] = ()
    multiples: tuple[int, ...] = ()

    @cached_property
    def arrays(self) -> dict[str, ArraySpec]:
        """What it is kept as, by what is added to its name."""
        multiples = self.multiples or (1,) * len(self.shape)
        if self.scheme is None:
            return {"": ArraySpec(self.shape, self.dtype, self.axes, multiples)}
        *first, rows, columns = multiples
        values = *first, rows, columns // self.scheme.packed
        blocks = *first, rows // self.scheme.rows, columns // self.scheme.block[1]
        return {
            suffix: ArraySpec(
                shape,
                jnp.dtype(kind),
                axes_of_scales(self.axes, self.scheme) if suffix else self.axes,
                blocks if suffix else values,
            )
            for suffix, (shape, kind) in self.scheme.arrays(*self.shape).items()
        }

    def with_sharding(self, suffix: str, placement: jax.Device | Mesh) -> jax.ShapeDtypeStruct:
        """One of its arrays abstractly, with its sharding, see `sharding.with_sharding`. Raises ValueError if the mesh
        would split weights that have one scale."""
        if self.scheme is not None and not suffix:
            self._check_split(self.scheme, placement)
        array = self.arrays[suffix]
        return with_sharding(array.abstract, array.axes, placement, array.multiples)

    def bind(self, params: Mapping[str, jax.Array], rounds: bool) -> Weight | jax.Array | None:
        """What the module is given in its place; None if it is not among the parameters. rounds: see QArray."""
        if self.name not in params or self.is_embedding is None:
            return params.get(self.name)
        if self.scheme is None:
            return Dense(params[self.name], self.axes)
        zeros, biases = (params.get(self.name + suffix) for suffix in (ZERO, BIAS))
        return QArray(params[self.name], params[self.name + SCALE], self.scheme, self.axes, rounds, zeros, biases)

    def _check_split(self, scheme: Scheme, placement: jax.Device | Mesh) -> None:
        block = (*(1,) * (len(self.shape) - 2), *scheme.block)
        parts = zip(self.axes, self.shape, counts(self.axes, placement), block, strict=True)
        for i, (axis, size, count, unit) in enumerate(parts, 2 - len(self.shape)):
            if axis not in PADDED and count > 1 and size % (count * unit):
                fitting = ", ".join(str(n) for n in range(1, count) if size % (n * unit) == 0)
                what = ("outputs", "inputs")[i] if i >= 0 else "experts"
                raise ValueError(
                    f"{self.name}: its {size} {what} would be split into {count} parts by the mesh, and {unit} have "
                    f"one scale; {scheme.name if scheme else NONE} allows {fitting or 'no'} parts"
                )


def quantized(
    specs: Iterable[ParamSpec], quantization: Quantization | None, stored: Stored | None, dtype_name: str
) -> list[ParamSpec]:
    """The specs with their schemes: as the user wants it, or as the checkpoint has it. dtype_name: in which floats
    what its scheme can't have is left, for a warning; nothing for none. Raises ValueError."""
    result = []
    left: dict[str, list[str]] = {}  # those that the scheme can't have, by why
    for spec in specs:
        spec = _found(spec, stored)
        if spec.is_embedding is not None:
            scheme = scheme_of(quantization, spec.name, spec.is_embedding)
            if stored is not None:
                wanted, scheme = scheme, spec.stored.scheme(*spec.shape[-2:]) if spec.stored else None
                if quantization is not None and wanted != scheme:
                    raise ValueError(
                        f"quantization is {quantization!r}: the checkpoint is quantized already ({stored.method}), and "
                        f"{spec.name} is in {scheme.name if scheme else 'floats'}: leave it out, or take the original "
                        "checkpoint"
                    )
            try:
                if scheme is not None:
                    scheme.arrays(*spec.shape)
                    spec = replace(spec, scheme=scheme)
            except ValueError as error:
                left.setdefault(str(error), []).append(spec.name)
        result.append(spec)
    if quantization is not None and not any(spec.scheme for spec in result):
        why = f"; {next(iter(left))}" if left else ""
        raise ValueError(f"quantization is {quantization!r}: none of the model's weights is meant by it{why}")
    for why, names in left.items() if dtype_name else ():
        log.warning("quantization is %r: %s is left in %s: %s", quantization, in_short(names), dtype_name, why)
    return _with_multiples(result)


def in_short(names: Iterable[str]) -> str:
    """Names of weights, of all layers together."""
    return ", ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))


def _found(spec: ParamSpec, stored: Stored | None) -> ParamSpec:
    """With where the checkpoint may have it, and in what format: the places that the format allows. Raises ValueError
    if there is none."""
    found: list[tuple[Source, Format | None]] = []
    errors: list[ValueError] = []
    for source in spec.source.spellings():
        try:
            found.append((source, None if stored is None else _format(spec, source, stored)))
        except ValueError as error:
            errors.append(error)
    if not found:
        raise errors[0]
    (source, form), *others = found
    return replace(spec, source=source, stored=form, elsewhere=tuple(others))


def _format(spec: ParamSpec, source: Source, stored: Stored) -> Format | None:
    """The checkpoint's own. Raises ValueError where a weight is cut out of what can't be cut."""
    # What quantizes tables does so with routers, too.
    is_linear = spec.is_embedding is False or (stored.tables and spec.name.endswith(".weight") and len(spec.shape) > 1)
    if not is_linear:
        return None
    regions = list(source.regions(whole(spec.shape)))
    shapes = source.tensors(spec.shape)
    kinds = {(region.tensor.removesuffix(".weight"), "Conv1D" if region.transposed else "Linear") for region in regions}
    form, *others = (stored.format_of(*kind) for kind in sorted(kinds))
    if any(other != form for other in others):
        raise ValueError(f"config.json: quantization_config: {spec.name} is of tensors that are not quantized alike")
    # mlx-lm leaves those alone that its groups don't divide.
    if form is None or (stored.method == MLX and spec.shape[-1] % form.columns):
        return None
    for region in regions:
        turn = -1 if region.transposed else 1
        (*_, rows, columns), size = region.stored, shapes[region.tensor]
        if region.transposed and form.layout != "gptq":
            raise ValueError(
                f"config.json: quantization_config.quant_method is {stored.method!r}: {region.tensor} is stored [in, "
                "out], which is read with 'gptq' alone; take the original checkpoint"
            )
        if len(size) > 2 and form.layout not in STACKED:
            raise ValueError(
                f"config.json: quantization_config.quant_method is {stored.method!r}: {region.tensor} has experts in "
                f"one tensor, which is read with {' and '.join(map(repr, STACKED))} alone; take the original checkpoint"
            )
        (rows, columns), (high, wide) = (rows, columns)[::turn], size[-2:][::turn]
        if columns != (0, wide) or (form.rows > 1 and rows != (0, high)):
            raise ValueError(
                f"config.json: quantization_config.quant_method is {stored.method!r}: {spec.name} is a part of "
                f"{region.tensor}, which has scales that can't be cut there; take the original checkpoint"
            )
    return form


def _with_multiples(specs: list[ParamSpec]) -> list[ParamSpec]:
    """How many places of each axis belong together: what pads one weight pads those that it meets."""
    units: dict[str | None, int] = {}
    for spec in specs:
        if spec.scheme is not None:
            for axis, unit in zip(spec.axes[-2:], spec.scheme.block, strict=True):
                units[axis] = math.lcm(units.get(axis, 1), unit)
    return [replace(spec, multiples=tuple(units.get(axis, 1) for axis in spec.axes)) for spec in specs]
