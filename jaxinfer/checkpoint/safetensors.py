"""A strict reader of the safetensors format which reads only the bytes that are asked for.

Format: https://github.com/huggingface/safetensors, section "Format": 8 bytes with the length of the header (u64,
little-endian), a JSON header `{name: {"dtype", "shape", "data_offsets": [begin, end]}}` and then the tensors' bytes,
which the header must cover exactly.

The bytes are read with preadv into arrays of our own. Mapping the file would count its pages as resident memory.
"""

import itertools
import json
import math
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import ml_dtypes
import numpy as np

from jaxinfer.checkpoint.files import short
from jaxinfer.checkpoint.memory import ALIGNMENT
from jaxinfer.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the reference implementation's limit
_PIECE = 64 * 2**20  # bytes a system call: Ctrl-C is heard between two
_MAX_RANK = 32

DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "U16": np.uint16,
        "I16": np.int16,
        "U32": np.uint32,
        "I32": np.int32,
        "U64": np.uint64,
        "I64": np.int64,
        "F16": np.float16,
        "F32": np.float32,
        "F64": np.float64,
        "C64": np.complex64,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
        "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    }.items()
}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies, in C order.

    name, dtype, shape: as the header says.
    file: which has it.
    offset, nbytes: from which byte of the file on, and how many.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


class SafetensorsFile:
    """An open safetensors file whose header has been checked completely.

    path: of the file.
    tensors: name -> TensorInfo in the order of the bytes.
    metadata: the header's free text.

    Raises ValueError (one line, which names the file) for anything that is not a valid file, OSError if it can't be
    read. Threads may share one object.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        # Without O_NONBLOCK, opening a named pipe would wait for a writer for ever.
        self._file = open(self.path, "rb", buffering=0, opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK))  # noqa: SIM115
        try:
            status = os.fstat(self._file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise self._bad("not a regular file")
            self.tensors, self.metadata = self._parse(status.st_size)
        except BaseException:
            self.close()
            raise

    def read(self, info: TensorInfo, index: tuple[slice, ...] | None = None) -> np.ndarray[Any, np.dtype[Any]]:
        """Reads a tensor, or the part `index` of it, into a new C-contiguous array aligned to 64 bytes (unless empty).

        `index` has a slice for each leading axis (as numpy's, without negative steps); missing axes are taken whole. No
        other bytes are read but those that a step leaves out: a slice of the first axis is one run of bytes, others are
        one per row.
        Raises ValueError for an index that does not fit, OSError when the file has become shorter.
        """
        if self.tensors.get(info.name) != info:
            raise ValueError(f"{self.path}: tensor {short(info.name)} is not of this file")
        bounds = _bounds(info, index or ())
        size = math.prod(stop - start for start, stop in bounds) * info.dtype.itemsize
        raw = aligned(size)
        if size:
            done = 0
            for offset, length in _runs(info, bounds):
                self._fill(raw.data[done : done + length], offset)
                done += length
        if info.dtype == np.bool_ and raw.max(initial=0) > 1:
            raise self._bad(f"tensor {short(info.name)} is BOOL but has bytes other than 0 and 1")
        array = raw.view(info.dtype).reshape([stop - start for start, stop in bounds])
        return array[tuple(slice(None, None, part.step) for part in index)] if index else array

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _bad(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: not a valid safetensors file: {problem}; download or write it again")

    def _fill(self, view: memoryview, offset: int) -> None:
        while view:
            count = os.preadv(self._file.fileno(), [view[:_PIECE]], offset)
            if count == 0:
                raise OSError(
                    f"{self.path}: ends at byte {offset}, {len(view)} bytes too early: it was cut after opening"
                )
            view, offset = view[count:], offset + count

    def _parse(self, file_size: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
        if file_size < 8:
            raise self._bad(f"{file_size} bytes are too few for a header")
        prefix = bytearray(8)
        self._fill(memoryview(prefix), 0)
        length = int.from_bytes(prefix, "little")
        if length > min(MAX_HEADER_BYTES, file_size - 8):
            raise self._bad(
                f"the header is said to have {length} bytes, the file has {file_size} (limit: {MAX_HEADER_BYTES})"
            )
        text = bytearray(length)
        self._fill(memoryview(text), 8)
        if not text.startswith(b"{"):
            raise self._bad("the header does not begin with '{'")
        try:
            header = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise self._bad(f"header: {error}") from None
        metadata = header.pop("__metadata__", None)
        if metadata is None:
            metadata = {}
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self._bad("__metadata__ must map text to text")
        data_start = 8 + length
        infos = sorted(
            (self._info(name, entry, data_start) for name, entry in header.items()),
            key=lambda info: (info.offset, info.nbytes),
        )
        end = data_start
        for info in infos:
            if info.offset != end:
                raise self._bad(
                    f"tensor {short(info.name)} begins at byte {info.offset}, but the one before it ends at {end}"
                )
            end += info.nbytes
        if end != file_size:
            raise self._bad(f"the tensors end at byte {end}, the file at {file_size}")
        return {info.name: info for info in infos}, metadata

    def _info(self, name: str, entry: Any, data_start: int) -> TensorInfo:
        where = f"tensor {short(name)}"
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise self._bad(f"{where} must have exactly dtype, shape and data_offsets")
        dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
            raise self._bad(f"{where} has dtype {short(dtype_name)}; known are {', '.join(DTYPES)}")
        if not _are_sizes(shape) or len(shape) > _MAX_RANK:
            raise self._bad(f"{where} has shape {short(shape)}; it must be at most {_MAX_RANK} sizes of 0 or more")
        if not _are_sizes(offsets) or len(offsets) != 2:
            raise self._bad(f"{where} has data_offsets {short(offsets)}; they must be two positions of 0 or more")
        dtype = DTYPES[dtype_name]
        # numpy refuses sizes beyond an intp even where an axis of 0 makes the array empty.
        if math.prod(size or 1 for size in shape) * dtype.itemsize >= 2**63:
            raise self._bad(f"{where} has shape {short(shape)}, which is more than 2**63 bytes")
        nbytes = math.prod(shape) * dtype.itemsize
        if offsets[1] - offsets[0] != nbytes:
            raise self._bad(
                f"{where} has data_offsets {short(offsets)}, but {dtype_name} {short(shape)} has {nbytes} bytes"
            )
        return TensorInfo(name, dtype, tuple(shape), self.path, data_start + offsets[0], nbytes)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {short(twice)} is there twice")
    for key in result:
        key.encode()  # JSON can spell lone surrogates, which are no text: UnicodeEncodeError is a ValueError
    return result


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)  # no bool


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


def _runs(info: TensorInfo, bounds: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """(offset in the file, length) of the longest contiguous runs of bytes that make up the part, in order."""
    shape, bounds = (*info.shape, 1), [*bounds, (0, 1)]  # the axis of 1 saves scalars from being special
    stride = [math.prod(shape[axis + 1 :]) * info.dtype.itemsize for axis in range(len(shape))]
    # All axes after the last one that is cut are whole, so that they and that one are one run.
    cut = max((axis for axis, bound in enumerate(bounds) if bound != (0, shape[axis])), default=0)
    first = info.offset + bounds[cut][0] * stride[cut]
    length = (bounds[cut][1] - bounds[cut][0]) * stride[cut]
    rows = itertools.product(
        *(
            range(start * step, stop * step, step)
            for (start, stop), step in zip(bounds[:cut], stride[:cut], strict=True)
        )
    )
    return ((first + sum(row), length) for row in rows)


def aligned(size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """`size` uninitialized bytes that XLA:CPU takes as they are, without a copy of its own."""
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size]
