"""A folder that is written as a whole or not at all, here or in an object store."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from jaxinfer.checkpoint.orbax import MANIFEST

# What goes along with weights: the tokenizer, how to generate, and what must not be separated from them.
BESIDE = ("*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt", "LICENSE*", "NOTICE*")
NOT_BESIDE = ("config.json", "*.index.json", "quantize_config.json", "quant_config.json", MANIFEST)


def file_system(output: str) -> tuple[Any, str]:
    """Of a folder or URL, and the path in it. Raises ValueError if it is no place."""
    try:
        fs, path = fsspec.core.url_to_fs(output)
    except (ValueError, ImportError) as error:
        raise ValueError(f"output {output}: {error}") from None
    return fs, path.rstrip("/")


def check_output(output: str) -> tuple[Any, str]:
    """As file_system. Raises ValueError if something is there, too."""
    fs, path = file_system(output)
    if fs.exists(path):
        raise ValueError(f"output {output}: is there already: give another name, or remove it first")
    return fs, path


@contextlib.contextmanager
def written(output: str) -> Iterator[str]:
    """Where to write what is to become the folder `output`. A local one has another name until all is written;
    elsewhere nothing can be renamed, so what must be there for others to take it as whole is to be written last.
    Raises what check_output raises, and OSError."""
    fs, path = check_output(output)
    if not isinstance(fs, LocalFileSystem):
        yield output.rstrip("/")
        return
    with renamed(path) as target:
        yield target


@contextlib.contextmanager
def renamed(path: str, replaces: bool = False) -> Iterator[str]:
    """A new local folder, which is called `path` when all is written, and is gone if that fails. replaces: the one that
    has this name until then."""
    target = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.tmp")
    shutil.rmtree(target, ignore_errors=True)  # of one that was killed
    try:
        os.makedirs(target)
        yield target
        old = f"{target}.old"
        if replaces:
            shutil.rmtree(old, ignore_errors=True)
            if os.path.exists(path):
                os.rename(path, old)
        os.rename(target, path)
        if replaces:
            shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise


def put(path: str, content: bytes) -> None:
    """Writes a file of a folder or URL that is being written."""
    fs, inside = fsspec.core.url_to_fs(path)
    fs.pipe_file(inside, content)


def put_beside(folder: Path, path: str) -> None:
    """Copies the files of a checkpoint that are neither weights nor config.json."""
    for file in sorted(folder.iterdir()):
        fits = any(fnmatch(file.name, pattern) for pattern in BESIDE)
        if fits and file.is_file() and not any(fnmatch(file.name, pattern) for pattern in NOT_BESIDE):
            put(f"{path}/{file.name}", file.read_bytes())
