"""Files of tensors, of which only the bytes that are asked for are read.

The bytes are read with preadv into arrays of our own. Mapping the file would count its pages as resident memory.
"""

from __future__ import annotations

import itertools
import math
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from jaxinfer.checkpoint.files import short
from jaxinfer.checkpoint.memory import ALIGNMENT
from jaxinfer.errors import CheckpointError

Array = np.ndarray[Any, np.dtype[Any]]
Shape = tuple[int, ...]

MAX_RANK = 32
_PIECE = 64 * 2**20  # bytes a system call: Ctrl-C is heard between two
_STEP = 8  # elements up to which those between two wanted ones are read along


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies.

    name, dtype, shape: as the file says.
    file: which has it.
    offset: of its first element, in bytes.
    strides: bytes from one index of an axis to the next, 0 or more.
    """

    name: str
    dtype: np.dtype[Any]
    shape: Shape
    file: Path
    offset: int
    strides: Shape

    @property
    def nbytes(self) -> int:
        """Of the array that `read` gives."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile(ABC):
    """An open file of tensors, all of which has been checked but the tensors' values.

    path: of the file.
    tensors: name -> TensorInfo in the order of the bytes.

    Raises ValueError (one line, which names the file) for anything that is not a valid file, OSError if it can't be
    read. Threads may share one object.
    """

    FORMAT: ClassVar[str]
    tensors: Mapping[str, TensorInfo]

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        # Without O_NONBLOCK, opening a named pipe would wait for a writer for ever.
        self._file = open(self.path, "rb", buffering=0, opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK))  # noqa: SIM115
        try:
            status = os.fstat(self._file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise self._bad("not a regular file")
            self.tensors = _in_order(self._parse(status.st_size))
        except BaseException:
            self.close()
            raise

    def read(self, info: TensorInfo, index: tuple[slice, ...] | None = None) -> Array:
        """Reads a tensor, or the part `index` of it, into a new C-contiguous array aligned to 64 bytes (unless empty).

        `index` has a slice for each leading axis (as numpy's, without negative steps); missing axes are taken whole. No
        other bytes are read but those that a step leaves out, of the index or of a tensor that is itself a part of
        another: of one in C order a slice of the first axis is one run of bytes, others are one per row.
        Raises ValueError for an index that does not fit, OSError when the file has become shorter.
        """
        if self.tensors.get(info.name) != info:
            raise ValueError(f"{self.path}: tensor {short(info.name)} is not of this file")
        array = self._part(info, _bounds(info, index or ()))
        if info.dtype == np.bool_ and array.view(np.uint8).max(initial=0) > 1:
            raise self._bad(f"tensor {short(info.name)} is BOOL but has bytes other than 0 and 1")
        return array[tuple(slice(None, None, part.step) for part in index)] if index else array

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def _parse(self, size: int) -> Iterable[TensorInfo]:
        """The tensors of a file of `size` bytes, within which they lie. Raises CheckpointError."""

    def _bad(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: not a valid {self.FORMAT} file: {problem}; download or write it again")

    def _fill(self, view: memoryview, offset: int) -> None:
        while view:
            count = os.preadv(self._file.fileno(), [view[:_PIECE]], offset)
            if count == 0:
                raise OSError(
                    f"{self.path}: ends at byte {offset}, {len(view)} bytes too early: it was cut after opening"
                )
            view, offset = view[count:], offset + count

    def _part(self, info: TensorInfo, bounds: list[tuple[int, int]]) -> Array:
        shape = tuple(stop - start for start, stop in bounds)
        if 0 in shape:
            return aligned(0).view(info.dtype).reshape(shape)
        first = info.offset + sum(start * stride for (start, _), stride in zip(bounds, info.strides, strict=True))
        # The axes as they lie in the file, outermost first; one that repeats the same bytes is read once.
        order = sorted(range(len(shape)), key=lambda axis: -info.strides[axis])
        counts = tuple(shape[axis] if info.strides[axis] else 1 for axis in order)
        strides = tuple(info.strides[axis] for axis in order)
        array = aligned(math.prod(counts) * info.dtype.itemsize).view(info.dtype).reshape(counts)
        self._gather(array, first, strides, _smallest(info))
        array = array.transpose(np.argsort(order))
        return array if array.shape == shape and array.flags.c_contiguous else _copied(np.broadcast_to(array, shape))

    def _gather(self, array: Array, first: int, strides: Shape, smallest: int) -> None:
        """Fills `array` from the byte `first` on, whose axes lie by `strides`, outermost first; `smallest` is the
        tensor's own smallest stride."""
        shape, one = array.shape, array.itemsize
        # How far the last axes reach, from each axis on.
        reach = [
            one + sum((count - 1) * stride for count, stride in zip(shape[axis:], strides[axis:], strict=True))
            for axis in range(array.ndim + 1)
        ]
        # The last axes that one run of bytes has: without gaps, or overlapping so much that they want more than it has.
        axis = next(axis for axis, run in enumerate(reach) if run <= math.prod(shape[axis:]) * one)
        if axis and reach[axis] == one and strides[axis - 1] == smallest <= _STEP * one:  # with little between
            axis -= 1
            while axis and strides[axis - 1] <= reach[axis]:
                axis -= 1
        run = reach[axis]
        dense = all(
            count == 1 or stride == inner
            for count, stride, inner in zip(shape[axis:], strides[axis:], reach[axis + 1 :], strict=True)
        )
        rows = array.reshape(-1, *shape[axis:])
        piece = None if dense else bytearray(run)
        target = array.reshape(-1).view(np.uint8).data if dense else memoryview(b"")
        for number, place in enumerate(_places(first, shape[:axis], strides[:axis])):
            if piece is None:
                self._fill(target[number * run : (number + 1) * run], place)
            else:
                self._fill(memoryview(piece), place)
                rows[number] = np.ndarray(shape[axis:], array.dtype, piece, strides=strides[axis:])


def _places(first: int, counts: Shape, strides: Shape) -> Iterator[int]:
    """Where the rows of axes begin, in order. No list is made of them: a file may say that there are many."""
    if not counts:
        yield first
    for index in range(counts[0] if counts else 0):
        yield from _places(first + index * strides[0], counts[1:], strides[1:])


def row_major(shape: Shape, itemsize: int) -> Shape:
    """The strides of C order."""
    return tuple(math.prod(shape[axis + 1 :]) * itemsize for axis in range(len(shape)))


def aligned(size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """`size` uninitialized bytes that XLA:CPU takes as they are, without a copy of its own."""
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size]


def _copied(array: Array) -> Array:
    copy: Array = aligned(array.nbytes).view(array.dtype).reshape(array.shape)
    np.copyto(copy, array)
    return copy


def _in_order(infos: Iterable[TensorInfo]) -> dict[str, TensorInfo]:
    return {info.name: info for info in sorted(infos, key=lambda info: (info.offset, info.nbytes))}


def _smallest(info: TensorInfo) -> int:
    strides = (stride for stride, size in zip(info.strides, info.shape, strict=True) if size > 1 and stride)
    return min(strides, default=info.dtype.itemsize)


def _bounds(info: TensorInfo, index: tuple[slice, ...]) -> list[tuple[int, int]]:
    """(start, stop) of each axis, within its size and with start <= stop."""
    if len(index) > len(info.shape):
        raise ValueError(f"tensor {short(info.name)} has {len(info.shape)} axes, the index {len(index)}")
    bounds = []
    for part, size in itertools.zip_longest(index, info.shape, fillvalue=slice(None)):
        assert isinstance(size, int)
        if not isinstance(part, slice) or (part.step is not None and part.step < 1):
            raise ValueError(f"tensor {short(info.name)}: index {part!r} must be a slice of steps forward")
        start, stop, _ = part.indices(size)
        bounds.append((start, max(start, stop)))
    return bounds
