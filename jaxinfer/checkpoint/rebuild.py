"""What the names in a pickle of torch.save mean here: storages, dtypes, tensors, ordered dictionaries and sizes.

Formats: torch's `torch/storage.py` (names of storages), `torch/_tensor.py` and `torch/_utils.py` (tensors as calls of
`_rebuild_*`). Names that are not here are refused. What a call gets is looked at one level deep: containers are never
compared, hashed or walked as a whole, as one may hold another twice, which holds a third twice, and so on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from jaxinfer.checkpoint.files import short
from jaxinfer.checkpoint.tensors import MAX_RANK

BYTES = "UntypedStorage"  # of no dtype
STORAGES: dict[str, np.dtype[Any]] = {
    f"{name}Storage": np.dtype(dtype)
    for name, dtype in {
        "Bool": np.bool_,
        "Byte": np.uint8,
        "Char": np.int8,
        "Short": np.int16,
        "Int": np.int32,
        "Long": np.int64,
        "Half": np.float16,
        "Float": np.float32,
        "Double": np.float64,
        "BFloat16": ml_dtypes.bfloat16,
        "ComplexFloat": np.complex64,
    }.items()
} | {BYTES: np.dtype(np.uint8)}
DTYPES: dict[str, np.dtype[Any]] = {  # whose names are numpy's, and ml_dtypes'
    name: np.dtype(name)
    for name in (
        *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
        *("float16", "float32", "float64", "bfloat16", "complex64"),
        *("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz"),
    )
}


@dataclass(frozen=True, eq=False)
class Name:
    """A name that a pickle says, of the closed list: text and nothing else."""

    text: str


@dataclass(frozen=True)
class Storage:
    """Numbers in a row somewhere in the file: `count` of `dtype` (bytes, where it has none) under `key`."""

    key: str
    dtype: np.dtype[Any]
    count: int

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class View:
    """A tensor: part of a storage. `offset` and `strides` in elements of its own dtype."""

    storage: Storage
    dtype: np.dtype[Any]
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Ordered(dict[Any, Any]):
    """A collections.OrderedDict; its attributes (`_metadata` of modules) are left out."""

    __slots__ = ()


def called(function: str, arguments: tuple[Any, ...]) -> Any:
    minimum, maximum, call = CALLS[function]
    if not minimum <= len(arguments) <= maximum:
        raise ValueError(f"{function} with {len(arguments)} arguments")
    return call(*arguments)


def _ordered(pairs: Any = None) -> Ordered:
    result = Ordered()
    if pairs is not None:  # Python 2's
        if type(pairs) is not list or not all(type(pair) in (list, tuple) and len(pair) == 2 for pair in pairs):
            raise ValueError("an OrderedDict of what are no pairs")
        add_items(result, pairs)
    return result


def _size(sizes: Any) -> tuple[int, ...]:
    return _integers(sizes, "torch.Size")


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> View:
    if type(storage) is not Storage:
        raise ValueError(f"a tensor of {what(storage)} instead of a storage")
    return _view(storage, storage.dtype, offset, shape, strides)


def _tensor_v2(
    storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any, metadata: Any = None
) -> View:
    _check_metadata(metadata)
    return _tensor(storage, offset, shape, strides)


def _tensor_v3(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    requires_grad: Any,
    hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> View:
    _check_metadata(metadata)
    kind = DTYPES.get(dtype.text.removeprefix("torch.")) if type(dtype) is Name else None
    if type(storage) is not Storage or kind is None:
        raise ValueError(f"a tensor of {what(storage)} with {what(dtype)} instead of a storage and a dtype")
    return _view(storage, kind, offset, shape, strides)


def _parameter(data: Any, requires_grad: Any, hooks: Any, state: Any = None) -> View:
    """Attributes that somebody has given it are left out."""
    if type(data) is not View:
        raise ValueError(f"a Parameter of {what(data)}")
    return data


def _of_type(function: Any, kind: Any, arguments: Any, state: Any) -> View:
    """A tensor with attributes, which are left out."""
    if type(function) is not Name or function.text not in _TENSORS or type(arguments) is not tuple:
        raise ValueError(f"a tensor made by {what(function)}")
    if type(kind) is not Name or kind.text not in _TYPES:
        raise ValueError(f"a tensor of the type {what(kind)}")
    made = called(function.text, arguments)
    assert type(made) is View
    return made


def _view(storage: Storage, dtype: np.dtype[Any], offset: Any, shape: Any, strides: Any) -> View:
    shape, strides = _integers(shape, "shape"), _integers(strides, "strides")
    (offset,) = _integers((offset,), "offset")
    if len(shape) != len(strides):
        raise ValueError(f"a tensor of {len(shape)} axes with {len(strides)} strides")
    size = storage.nbytes // dtype.itemsize
    last = offset + sum((count - 1) * stride for count, stride in zip(shape, strides, strict=True))
    if offset > size or (0 not in shape and last >= size):
        raise ValueError(f"a tensor reaches to element {last} of storage {short(storage.key)}, which has {size}")
    # numpy refuses sizes beyond an intp even where an axis of 0 makes the array empty.
    if math.prod(count or 1 for count in shape) * dtype.itemsize >= 2**63:
        raise ValueError("a tensor of more than 2**63 bytes")
    return View(storage, dtype, offset, shape, strides)


def _check_metadata(metadata: Any) -> None:
    if metadata:
        names = [key for key in metadata if type(key) is str] if type(metadata) is dict else []
        raise ValueError(f"a tensor whose values are not as stored ({', '.join(map(short, names[:5]))}): resolve it")


def _integers(values: Any, meaning: str) -> tuple[int, ...]:
    if type(values) not in (tuple, list) or len(values) > MAX_RANK:
        raise ValueError(f"{meaning}: not a tuple of at most {MAX_RANK} sizes")
    if not all(type(value) is int and 0 <= value < 2**63 for value in values):
        raise ValueError(f"{meaning}: not a tuple of sizes of 0 or more")
    return tuple(values)


def add_items(target: dict[Any, Any], pairs: Any) -> None:
    for key, value in pairs:
        # Others may have hashes that take for ever; integers are found in what optimizers keep.
        if type(key) is not str and not (type(key) is int and abs(key) < 2**63):
            raise ValueError(f"{what(key)} as a key; keys are names or integers")
        if key in target:
            raise ValueError(f"key {short(key)} is there twice")
        target[key] = value


def what(value: Any) -> str:
    """In messages: never what is inside, which may be endless."""
    if type(value) is Name:
        return value.text
    return "a tensor" if type(value) is View else f"a value of type {type(value).__name__}"


_TENSORS: dict[str, tuple[int, int, Callable[..., Any]]] = {
    "torch._utils._rebuild_tensor": (4, 4, _tensor),
    "torch._utils._rebuild_tensor_v2": (6, 7, _tensor_v2),
    "torch._utils._rebuild_tensor_v3": (7, 8, _tensor_v3),
    "torch._utils._rebuild_parameter": (3, 3, _parameter),
    "torch._utils._rebuild_parameter_with_state": (4, 4, _parameter),
}
CALLS = _TENSORS | {
    "collections.OrderedDict": (0, 1, _ordered),
    "torch.Size": (1, 1, _size),
    "torch._tensor._rebuild_from_type_v2": (4, 4, _of_type),
}
_TYPES = {"torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"}
NAMES = {
    name: Name(name)
    for name in (
        *CALLS,
        *_TYPES,
        *(f"torch.{name}" for name in (*STORAGES, *DTYPES)),
        f"torch.storage.{BYTES}",
    )
}
