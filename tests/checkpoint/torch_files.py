"""Files in the forms of torch.save, with any pickle in them; what they hold by the letter; and a watch over what is run
while they are read."""

import builtins
import io
import os
import pickle
import struct
import sys
import time
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from jaxinfer.checkpoint.pickled import PickledFile

MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001
MACHINE = {"protocol_version": VERSION, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
STORAGE = np.arange(12, dtype=np.float32).tobytes()


def zipped(
    value: bytes, storages: Mapping[str, bytes], more: Mapping[str, bytes] | None = None, top: str = "a"
) -> bytes:
    records = {
        "data.pkl": value,
        "byteorder": b"little",
        "version": b"3\n",
        **{f"data/{key}": raw for key, raw in storages.items()},
    }
    return packed({f"{top}/{name}": content for name, content in (records | dict(more or {})).items()})


def packed(records: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in records.items():
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return file.getvalue()


def legacy(value: bytes, storages: Mapping[str, bytes], itemsize: int = 4) -> bytes:
    """Its storages have a sixth fact, which is None: whether they are parts of others."""
    head = b"".join(pickle.dumps(fact, 2) for fact in (MAGIC, VERSION, MACHINE))
    value = value.replace(b"tQ", b"NtQ")
    data = b"".join(struct.pack("<q", len(raw) // itemsize) + raw for raw in storages.values())
    return head + value + pickle.dumps(list(storages), 2) + data


# Pieces of pickles of protocol 2 ----------------------------------------------------------------------------------


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    return (
        b"J" + struct.pack("<i", value)
        if -(2**31) <= value < 2**31
        else b"\x8a\x09" + value.to_bytes(9, "little", signed=True)
    )


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def storage(count: int = 12, kind: str = "FloatStorage", key: str = "0") -> bytes:
    return b"(" + text("storage") + name("torch", kind) + text(key) + text("cpu") + number(count) + b"tQ"


def tensor(
    offset: int = 0, shape: tuple[int, ...] = (3, 4), strides: tuple[int, ...] = (4, 1), of: bytes | None = None
) -> bytes:
    sizes = b"".join(b"(" + b"".join(map(number, numbers)) + b"t" for numbers in (shape, strides))
    hooks = name("collections", "OrderedDict") + b")R"
    arguments = (storage() if of is None else of) + number(offset) + sizes + b"\x89" + hooks
    return name("torch._utils", "_rebuild_tensor_v2") + b"(" + arguments + b"tR"


def dictionary(**items: bytes) -> bytes:
    return b"\x80\x02}(" + b"".join(text(key) + value for key, value in items.items()) + b"u."


GOOD = dictionary(a=tensor())


def dumps(*values: object) -> bytes:
    return b"".join(pickle.dumps(value, 2) for value in values)


# What a file holds by the letter ----------------------------------------------------------------------------------


class _Literal(pickle.Unpickler):
    """Python's own pickle over a closed list, for files that were taken: what they say without any of our checks."""

    DTYPES: ClassVar = {
        "FloatStorage": "<f4",
        "LongStorage": "<i8",
        "HalfStorage": "<f2",
        "ByteStorage": "u1",
        "BoolStorage": "?",
    }

    def find_class(self, module: str, attribute: str) -> Any:
        if attribute in self.DTYPES:
            return self.DTYPES[attribute]
        known = {
            "OrderedDict": OrderedDict,
            "_rebuild_tensor_v2": self.tensor,
            "_rebuild_parameter": lambda data, *_: data,
        }
        return known[attribute]

    def persistent_load(self, pid: Any) -> Any:
        return pid

    @staticmethod
    def tensor(pid: Any, offset: int, shape: Any, strides: Any, *_: Any) -> Any:
        return pid, offset, tuple(shape), tuple(strides)


def literal(content: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """dtype, shape and bytes of each tensor."""
    stream = io.BytesIO(content)
    storages: dict[str, bytes] = {}
    if content.startswith(b"PK"):
        with zipfile.ZipFile(stream) as archive:
            top = archive.namelist()[0].split("/")[0]

            def plain(record: str) -> bytes:  # as torch, which knows no checksums of records
                info = archive.getinfo(f"{top}/{record}")
                start = info.header_offset + 30 + sum(struct.unpack("<2H", content[info.header_offset + 26 :][:4]))
                return content[start : start + info.file_size]

            value = _Literal(io.BytesIO(plain("data.pkl"))).load()
            keys = [n.split("/", 2)[2] for n in archive.namelist() if n.startswith(f"{top}/data/")]
            storages = {key: plain(f"data/{key}") for key in keys}
    else:
        for _ in range(3):
            _Literal(stream).load()
        value, keys = (_Literal(stream).load() for _ in range(2))
        sizes = {pid[0][2]: (np.dtype(pid[0][1]).itemsize * pid[0][4]) for pid in _flat(value).values()}
        for key in keys:
            stream.read(8)
            storages[key] = stream.read(sizes[key])
    found = {}
    for key, ((_, kind, where, *_), offset, shape, strides) in _flat(value).items():
        dtype = np.dtype(kind)
        array = np.ndarray(
            shape, dtype, storages[where], offset * dtype.itemsize, [stride * dtype.itemsize for stride in strides]
        )
        found[key] = (str(dtype), shape, array.tobytes())
    return found


def _flat(value: dict[str, Any]) -> dict[str, Any]:
    return value["state_dict"] if isinstance(value.get("state_dict"), dict) else value


# What is run ------------------------------------------------------------------------------------------------------

_events: list[str] | None = None


def _audit(event: str, arguments: Any) -> None:
    if _events is None or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) == 0):
        return
    if not event.startswith(("object.", "gc.", "sys._")):
        _events.append(f"{event} {arguments!r:.100}")


sys.addaudithook(_audit)  # it stays, and hears nothing but within `watched`


@contextmanager
def watched() -> Iterator[list[str]]:
    """What the interpreter imports, compiles, runs, starts, connects to or opens for writing. It must stay empty."""
    global _events
    original, found = builtins.__import__, []

    def hook(module: str, *arguments: Any, **options: Any) -> Any:
        if not module.startswith("numpy."):  # numpy's own, of itself
            found.append(f"import {module} of {(arguments or [{}])[0].get('__name__')}")
        return original(module, *arguments, **options)

    builtins.__import__, _events = hook, found
    try:
        yield found
    finally:
        builtins.__import__, _events = original, None


Found = dict[str, tuple[str, tuple[int, ...], bytes]]


def opened(path: Path) -> Found:
    """What a file gives, with nothing run meanwhile."""
    with watched() as events:
        try:
            with PickledFile(path) as file:
                got = {name: file.read(info) for name, info in file.tensors.items()}
        finally:
            assert events == []
    return {name: (str(array.dtype), array.shape, array.tobytes()) for name, array in got.items()}


def refusal(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    tracemalloc.start()
    start = time.process_time()
    try:
        with pytest.raises(ValueError) as caught:
            opened(path)
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20 + 60 * len(content)
    finally:
        tracemalloc.stop()
    assert time.process_time() - start < 5
    message = str(caught.value)
    assert message.startswith(f"{path}: not a plain file of tensors: ")
    assert "\n" not in message
    assert len(message) < 1000
    return message.removeprefix(f"{path}: not a plain file of tensors: ")


def both(path: Path, value: bytes) -> set[str]:
    """What is said of this pickle in the two forms."""
    kept = {"0": STORAGE} if b"FloatStorage" in value else {}
    return {refusal(path, form(value, kept)) for form in (zipped, legacy)}


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path
