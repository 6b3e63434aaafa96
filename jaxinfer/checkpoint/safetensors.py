"""A strict reader of the safetensors format which reads only the bytes that are asked for.

Format: https://github.com/huggingface/safetensors, section "Format": 8 bytes with the length of the header (u64,
little-endian), a JSON header `{name: {"dtype", "shape", "data_offsets": [begin, end]}}` and then the tensors' bytes,
which the header must cover exactly.
"""

import json
import math
from collections.abc import Iterable
from typing import Any

import ml_dtypes
import numpy as np

from jaxinfer.checkpoint.files import short
from jaxinfer.checkpoint.tensors import MAX_RANK, TensorFile, TensorInfo, row_major

MAX_HEADER_BYTES = 100_000_000  # the reference implementation's limit

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


class SafetensorsFile(TensorFile):
    """An open safetensors file whose header has been checked completely.

    metadata: the header's free text.
    """

    FORMAT = "safetensors"
    metadata: dict[str, str]

    def _parse(self, file_size: int) -> Iterable[TensorInfo]:
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
        self.metadata = metadata
        return infos

    def _info(self, name: str, entry: Any, data_start: int) -> TensorInfo:
        where = f"tensor {short(name)}"
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise self._bad(f"{where} must have exactly dtype, shape and data_offsets")
        dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
            raise self._bad(f"{where} has dtype {short(dtype_name)}; known are {', '.join(DTYPES)}")
        if not _are_sizes(shape) or len(shape) > MAX_RANK:
            raise self._bad(f"{where} has shape {short(shape)}; it must be at most {MAX_RANK} sizes of 0 or more")
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
        return TensorInfo(
            name, dtype, tuple(shape), self.path, data_start + offsets[0], row_major(tuple(shape), dtype.itemsize)
        )


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
