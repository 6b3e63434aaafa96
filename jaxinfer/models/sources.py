"""Where a weight is found in a checkpoint: an expression over its tensors, good for reading and for writing.

Tensor("model.norm.weight")                            itself
Transposed(Tensor("h.0.mlp.c_fc.weight"))              stored [in, out]
Part(Tensor("attn.qkv.weight"), start=8, total=24)     rows from 8 on, of 24
Strided(Tensor("experts.gate_up_proj"), 1, 2, axis=2)  every other column, from the second on
Stack((Tensor("experts.0.up.weight"), ...))            its first axis is over tensors
Concat((Tensor("gate.weight"), Tensor("up.weight")), (8, 16))     one after the other, 8 and 16 rows
Row(Tensor("mlp.moe_statics.bias"))                    a vector, stored as [1, out]
Renamed(Tensor("model.norm.weight"), "model.", "language_model.model.")     under another name
OneOf((Tensor("up.weight"), Tensor("w3.weight")))      one or another, as checkpoints differ; the first is written
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Host = np.ndarray[Any, Any]
Shape = tuple[int, ...]
Index = tuple[tuple[int, int], ...]  # start and stop along each axis
Places = tuple[tuple[int, ...], ...]  # the same, and a step where it is not 1


@dataclass(frozen=True)
class Region:
    """A piece of a tensor, and its place in a piece of a weight.

    tensor: its name.
    stored: where in the tensor the piece is.
    index: where in the piece of the weight it belongs.
    transposed: its last two axes are the other way.
    """

    tensor: str
    stored: Places
    index: tuple[slice | int, ...]
    transposed: bool = False

    def turned(self, piece: Host) -> Host:
        """From the one to the other, either way."""
        return np.swapaxes(piece, -1, -2) if self.transposed else piece


class Source(ABC):
    """The expression."""

    @abstractmethod
    def tensors(self, shape: Shape) -> dict[str, Shape]:
        """The tensors that a weight of this shape takes, and theirs."""

    @abstractmethod
    def regions(self, index: Index) -> Iterator[Region]:
        """The pieces that a part of the weight consists of."""

    def spellings(self) -> tuple[Source, ...]:
        """Those that it may be in a checkpoint, the first of which it is where nothing is known."""
        return (self,)

    def read(self, index: Index, read: Callable[[str, tuple[slice, ...]], Host]) -> Host:
        """A part of the weight. `read` gives a part of a tensor; where one is all of it, it is not copied."""
        regions, out = list(self.regions(index)), None
        for region in regions:
            piece = region.turned(read(region.tensor, slices(region.stored)))
            if len(regions) == 1 and piece.ndim == len(index):
                return piece
            if out is None:
                out = np.empty(shape_of(index), piece.dtype)
            elif piece.dtype != out.dtype:  # both are floats, of 16 bits or more
                out = out.astype(np.float32)
            out[region.index] = piece
        return np.empty(shape_of(index), np.float32) if out is None else out  # None: of padding alone


@dataclass(frozen=True)
class Tensor(Source):
    """A tensor as it is.

    name: in the checkpoint.
    """

    name: str

    def tensors(self, shape: Shape) -> dict[str, Shape]:
        return {self.name: shape}

    def regions(self, index: Index) -> Iterator[Region]:
        yield Region(self.name, index, slices(whole(shape_of(index))))


@dataclass(frozen=True)
class Renamed(Source):
    """Tensors whose names begin differently.

    source: of these tensors.
    old, new: what names begin with there, and in the checkpoint.
    """

    source: Source
    old: str
    new: str

    def tensors(self, shape: Shape) -> dict[str, Shape]:
        return {self._name(name): size for name, size in self.source.tensors(shape).items()}

    def regions(self, index: Index) -> Iterator[Region]:
        for region in self.source.regions(index):
            yield replace(region, tensor=self._name(region.tensor))

    def spellings(self) -> tuple[Source, ...]:
        return tuple(replace(self, source=source) for source in self.source.spellings())

    def _name(self, name: str) -> str:
        return self.new + name.removeprefix(self.old) if name.startswith(self.old) else name


@dataclass(frozen=True)
class Transposed(Source):
    """The last two axes change places.

    source: what is transposed.
    """

    source: Source

    def tensors(self, shape: Shape) -> dict[str, Shape]:
        return self.source.tensors(_swapped(shape))

    def regions(self, index: Index) -> Iterator[Region]:
        for region in self.source.regions(_swapped(index)):
            yield replace(region, index=_swapped(region.index), transposed=not region.transposed)


@dataclass(frozen=True)
class Row(Source):
    """A vector that is stored as a matrix of one row.

    source: the matrix.
    """

    source: Source

    def tensors(self, shape: Shape) -> dict[str, Shape]:
        return self.source.tensors((1, *shape))

    def regions(self, index: Index) -> Iterator[Region]:
        for region in self.source.regions(((0, 1), *index)):
            yield replace(region, index=region.index[1:])


@dataclass(frozen=True)
class Part(Source):
    """A piece along an axis.

    source: what it is cut out of.
    start: the first of its places that is in the piece.
    total: how many places it has.
    axis: out, as a rule.
    """

    source: Source
    start: int
    total: int
    axis: int = 0

    def tensors(self, shape: Shape) -> dict[str, Shape]:
        return self.source.tensors(_replaced(shape, self.axis, self.total))

    def regions(self, index: Index) -> Iterator[Region]:
        start, stop = index[self.axis]
        yield from self.source.regions(_replaced(index, self.axis, (start + self.start, stop + self.start)))


@dataclass(frozen=True)
class Strided(Source):
    """Places of a tensor that are evenly apart.

    source: the tensor.
    start: the first of them.
    step: from one to the next; it divides the tensor's axis.
    axis: out, as a rule.
    """

    source: Tensor
    start: int
    step: int
    axis: int = 0

    def tensors(self, shape: Shape) -> dict[str, Shape]:
        return self.source.tensors(_replaced(shape, self.axis, shape[self.axis] * self.step))

    def regions(self, index: Index) -> Iterator[Region]:
        start, stop = index[self.axis]
        places = self.start + start * self.step, max(self.start + (stop - 1) * self.step + 1, 0), self.step
        yield Region(self.source.name, _replaced(index, self.axis, places), slices(whole(shape_of(index))))


@dataclass(frozen=True)
class OneOf(Source):
    """Checkpoints differ in where it is.

    sources: those that there are. The first is what is written.
    """

    sources: tuple[Source, ...]

    def tensors(self, shape: Shape) -> dict[str, Shape]:
        return self.sources[0].tensors(shape)

    def regions(self, index: Index) -> Iterator[Region]:
        return self.sources[0].regions(index)

    def spellings(self) -> tuple[Source, ...]:
        return tuple(spelling for source in self.sources for spelling in source.spellings())


@dataclass(frozen=True)
class Stack(Source):
    """The weight's first axis is over several.

    sources: of each along the axis.
    """

    sources: tuple[Source, ...]

    def tensors(self, shape: Shape) -> dict[str, Shape]:
        return {name: size for source in self.sources for name, size in source.tensors(shape[1:]).items()}

    def regions(self, index: Index) -> Iterator[Region]:
        start, stop = index[0]
        for i in range(start, stop):
            for region in self.sources[i].regions(index[1:]):
                yield replace(region, index=(i - start, *region.index))


@dataclass(frozen=True)
class Concat(Source):
    """One after the other along an axis.

    sources: in their order.
    sizes: of each along the axis.
    axis: out, as a rule.
    """

    sources: tuple[Source, ...]
    sizes: tuple[int, ...]
    axis: int = 0

    def tensors(self, shape: Shape) -> dict[str, Shape]:
        pairs = zip(self.sources, self.sizes, strict=True)
        each = (source.tensors(_replaced(shape, self.axis, size)) for source, size in pairs)
        return {name: stored for tensors in each for name, stored in tensors.items()}

    def regions(self, index: Index) -> Iterator[Region]:
        (start, stop), before = index[self.axis], 0
        for source, size in zip(self.sources, self.sizes, strict=True):
            first, last = max(start, before), min(stop, before + size)
            if first < last:
                shift = first - start
                for region in source.regions(_replaced(index, self.axis, (first - before, last - before))):
                    own = region.index[self.axis]
                    assert isinstance(own, slice)
                    moved = slice(own.start + shift, own.stop + shift)
                    yield replace(region, index=_replaced(region.index, self.axis, moved))
            before += size


def slices(index: Places) -> tuple[slice, ...]:
    """For arrays."""
    return tuple(slice(*part) for part in index)


def whole(shape: Shape) -> Index:
    """All of a weight."""
    return tuple((0, size) for size in shape)


def shape_of(index: Places) -> Shape:
    """Of a part of a weight, or of a tensor."""
    return tuple(len(range(*part)) for part in index)


def _swapped(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*values[:-2], values[-1], values[-2])


def _replaced(values: tuple[Any, ...], axis: int, value: Any) -> tuple[Any, ...]:
    return (*values[:axis], value, *values[axis + 1 :])
