"""Writes safetensors files of tensors that come one at a time, in any order: what is where is decided beforehand.

Format: see safetensors.py. Folders are laid out as transformers does: one file, or several with an index.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import IO, Any, NamedTuple, Self

import numpy as np

from jaxinfer.checkpoint.folder import INDEX, SINGLE
from jaxinfer.checkpoint.safetensors import DTYPES

FILE_BYTES = 5 * 10**9  # most in a file, as transformers has it
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Layout(NamedTuple):
    """A tensor without its values.

    shape, dtype: the tensor's.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsWriter:
    """The files of a folder, with all headers, into which tensors are then written.

    Use it as a context manager: at its end all tensors must be there. Raises OSError.
    """

    def __init__(self, folder: str, tensors: Mapping[str, Layout], file_bytes: int = FILE_BYTES) -> None:
        groups: list[dict[str, Layout]] = [{}]
        for name, layout in tensors.items():
            if groups[-1] and sum(member.nbytes for member in groups[-1].values()) + layout.nbytes > file_bytes:
                groups.append({})
            groups[-1][name] = layout
        stem = SINGLE.removesuffix(".safetensors")
        names = [f"{stem}-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
        names = [SINGLE] if len(groups) == 1 else names
        self.layouts = dict(tensors)
        self._missing = set(tensors)
        self._files: list[IO[bytes]] = []
        self._positions: dict[str, tuple[IO[bytes], int]] = {}
        try:
            for file_name, group in zip(names, groups, strict=True):
                self._begin(os.path.join(folder, file_name), group)
            if len(groups) > 1:
                size = sum(layout.nbytes for layout in tensors.values())
                where = {name: file for file, group in zip(names, groups, strict=True) for name in group}
                with open(os.path.join(folder, INDEX), "w") as index:
                    json.dump({"metadata": {"total_size": size}, "weight_map": where}, index, indent=2)
        except BaseException:
            self.close()
            raise

    def write(self, name: str, array: np.ndarray[Any, Any]) -> None:
        """A tensor of the layout that was said."""
        layout, (file, offset) = self.layouts[name], self._positions[name]
        assert Layout(array.shape, array.dtype) == layout, f"{name} is {array.shape} {array.dtype}, not {layout}"
        file.seek(offset)
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self._missing.discard(name)

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close()
        assert kind is not None or not self._missing, f"not written: {sorted(self._missing)}"

    def _begin(self, path: str, group: Mapping[str, Layout]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, layout in group.items():
            offsets = [end, end := end + layout.nbytes]
            header[name] = {"dtype": _NAMES[layout.dtype], "shape": list(layout.shape), "data_offsets": offsets}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
        file = open(path, "wb")  # noqa: SIM115
        self._files.append(file)
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        for name in group:
            self._positions[name] = file, 8 + len(text) + header[name]["data_offsets"][0]
