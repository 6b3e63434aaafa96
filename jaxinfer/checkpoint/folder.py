"""The weights of a checkpoint folder: one file of tensors, or several with an index."""

import os
import re
import threading
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Self

import numpy as np

from jaxinfer.checkpoint.contents import PICKLED_OTHER, PICKLED_SUFFIXES
from jaxinfer.checkpoint.files import check_folder, read_json, some
from jaxinfer.checkpoint.pickled import PickledFile
from jaxinfer.checkpoint.safetensors import SafetensorsFile
from jaxinfer.checkpoint.tensors import TensorFile, TensorInfo
from jaxinfer.errors import CheckpointError
from jaxinfer.places import inside


@dataclass(frozen=True)
class Kind:
    """A kind of files of tensors. single: the name of the one file. adapter: of one that is no model. suffixes: of its
    files. reader: of one. other: names, as in a shell, of what a training leaves beside the model."""

    single: str
    adapter: str
    suffixes: tuple[str, ...]
    reader: type[TensorFile]
    other: tuple[str, ...] = ()

    @property
    def index(self) -> str:
        return f"{self.single}.index.json"

    def files(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that may be a model's."""
        return [
            name
            for name in names
            if name.endswith(self.suffixes) and not any(fnmatchcase(name, p) for p in (self.adapter, *self.other))
        ]


SAFETENSORS = Kind("model.safetensors", "adapter_model.safetensors", (".safetensors",), SafetensorsFile)
PICKLED = Kind("pytorch_model.bin", "adapter_model.bin", PICKLED_SUFFIXES, PickledFile, PICKLED_OTHER)
SINGLE, INDEX = SAFETENSORS.single, SAFETENSORS.index
_FOREIGN = {".h5", ".msgpack", ".gguf"}


class Checkpoint:
    """All tensors of a folder, checked but not yet read.

    The files are, as in transformers, `model.safetensors`; else those that `model.safetensors.index.json` names;
    else the only `*.safetensors` there is, or a complete set `NAME-00001-of-0000N.safetensors` if it is the only one.
    Without any, the same of `pytorch_model.bin` and `*.bin`, `*.pt`, `*.pth` and `*.ckpt`. Files that an index names
    must lie directly in the folder (they may be links within it, or as in the hub's cache).

    folder: as a path.
    tensors: name -> TensorInfo, file by file in the order of the bytes.
    nbytes: of all tensors.
    bytes_read: what `read` has read so far.

    Threads may share one object.
    Raises FileNotFoundError or NotADirectoryError without a folder or weights, and ONE ValueError with all that is
    wrong: damaged or missing files, names that are in several files, or in the index or in a file only.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = check_folder(folder)
        self.tensors: dict[str, TensorInfo] = {}
        self.bytes_read = 0
        self._files: dict[Path, TensorFile] = {}
        self._lock = threading.Lock()
        self._closer = ExitStack()
        kind, names, index = _find(self.folder)
        try:
            problems = self._open(kind, names, index)
            if problems:
                raise CheckpointError(f"{self.folder}: {'; '.join(problems)}")
        except BaseException:
            self.close()
            raise
        self.nbytes = sum(info.nbytes for info in self.tensors.values())

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray[Any, np.dtype[Any]]:
        """The tensor `name`, or only the part `index` of it: see TensorFile.read. ValueError for no such name."""
        info = self.tensors.get(name)
        if info is None:
            raise ValueError(f"{self.folder}: has no tensor {name!r}")
        array = self._read(info, index)
        with self._lock:
            self.bytes_read += array.nbytes
        return array

    def _read(self, info: TensorInfo, index: tuple[slice, ...] | None) -> np.ndarray[Any, np.dtype[Any]]:
        return self._files[info.file].read(info, index)

    def close(self) -> None:
        self._closer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, kind: Kind, names: list[str], index: dict[str, str] | None) -> list[str]:
        """Opens the files and returns what is wrong."""
        outside, missing, damaged, twice, unindexed = [], [], [], [], []
        for name in names:
            path = self.folder / name
            if not _is_plain(name, kind):
                outside.append(name)
                continue
            if not os.path.exists(path):
                missing.append(name)
                continue
            try:
                if index is not None:
                    inside(self.folder, name, f"{kind.index}: file")
                file = self._closer.enter_context(kind.reader(path))
            except (OSError, ValueError) as error:
                damaged.append(str(error))
                continue
            self._files[path] = file
            for tensor, info in file.tensors.items():
                if tensor in self.tensors:
                    twice.append(f"{tensor} ({self.tensors[tensor].file.name}, {name})")
                    continue
                self.tensors[tensor] = info
                if index is not None and tensor not in index:
                    unindexed.append(f"{tensor} ({name})")
        endings = " or ".join(f"*{suffix}" for suffix in kind.suffixes)
        held = {path: opened.tensors for path, opened in self._files.items()}
        absent = [
            f"{tensor} ({name})"
            for tensor, name in (index or {}).items()
            if tensor not in held.get(self.folder / name, {tensor: None})
        ]
        return damaged + [
            f"{what}: {some(names)}"
            for what, names in [
                (f"names in {kind.index} that are not {endings} files in the folder itself", outside),
                ("missing files, which must be downloaded again", missing),
                ("tensors in more than one file", twice),
                (f"tensors in a file but not in {kind.index}", unindexed),
                (f"tensors not in the file that {kind.index} names", absent),
            ]
            if names
        ]


class DerivedCheckpoint(Checkpoint):
    """One whose tensors are made of another's when they are read.

    base: the other; who has opened it closes it.
    """

    def __init__(self, base: Checkpoint) -> None:
        self.base, self.folder, self.nbytes = base, base.folder, base.nbytes
        self.tensors = dict(base.tensors)
        self.bytes_read = 0
        self._lock, self._closer = threading.Lock(), ExitStack()

    def _read(self, info: TensorInfo, index: tuple[slice, ...] | None) -> np.ndarray[Any, np.dtype[Any]]:
        return self.base.read(info.name, index)


def _find(folder: Path) -> tuple[Kind, list[str], dict[str, str] | None]:
    """The names of the files of tensors, and the index (tensor -> file) where there is one."""
    names = sorted(entry.name for entry in folder.iterdir())
    for kind in (SAFETENSORS, PICKLED):
        if kind.single in names:
            return kind, [kind.single], None
        if kind.index in names:
            index = _read_index(folder / kind.index)
            return kind, sorted(set(index.values())), index
        if files := kind.files(names):
            return kind, _one_set(folder, kind, files), None
    adapter = next((kind.adapter for kind in (SAFETENSORS, PICKLED) if kind.adapter in names), None)
    if adapter is not None:
        raise ValueError(
            f"{folder}: has only an adapter ({adapter}): jaxinfer merge BASE {folder} DST writes the model"
        )
    raise _no_weights(folder, names)


def _one_set(folder: Path, kind: Kind, files: list[str]) -> list[str]:
    """`files`, if they are a model. Raises ValueError."""
    parts = [re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.\w+", name) for name in files]
    sets = {(part[1], int(part[3])) if part else (name, 1) for part, name in zip(parts, files, strict=True)}
    ending = kind.suffixes[0].removeprefix(".")
    if len(sets) > 1:
        raise ValueError(
            f"{folder}: several {ending} files ({some(files)}) and no {kind.index} that says which ones are the model;"
            " download the index too, or leave only one complete set"
        )
    (_, size), *_ = sets
    if any(part and int(part[2]) != number for number, part in enumerate(parts, 1)) or len(files) != size:
        raise ValueError(
            f"{folder}: no {kind.index}, and {some(files)} is not a complete set of {size}; download the missing files"
        )
    return files


def _read_index(path: Path) -> dict[str, str]:
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(name, str) for name in index.values()):
        raise ValueError(f"{path}: weight_map must map tensor names to file names")
    return index


def _is_plain(name: str, kind: Kind) -> bool:
    """Whether `name` can only be a file of the folder itself, and not of a place that a hostile index chooses."""
    return name.endswith(kind.suffixes) and not any(char in name for char in "/\\\0")


def _no_weights(folder: Path, names: list[str]) -> OSError | ValueError:
    foreign = [name for name in names if Path(name).suffix in _FOREIGN]
    if not foreign:
        return FileNotFoundError(f"{folder}: no weights; expected {SINGLE}, or {INDEX} and the files that it names")
    gguf = next((name for name in foreign if name.endswith(".gguf")), None)
    if gguf is None:
        how = (
            "convert it with transformers 4: from_pretrained(..., from_tf=True) or from_flax=True, then save_pretrained"
        )
    else:
        how = (
            f'convert it with: python -c "from transformers import AutoModelForCausalLM as M; M.from_pretrained('
            f"{str(folder)!r}, gguf_file={gguf!r}).save_pretrained('NEW_FOLDER')\" and copy the tokenizer's files there"
        )
    return ValueError(f"{folder}: no file of safetensors or torch, only {some(foreign)}, which is not read; {how}")
