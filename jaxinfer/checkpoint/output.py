"""A folder that is written as a whole or not at all, here or in an object store."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from fsspec.implementations.local import LocalFileSystem

from jaxinfer.checkpoint.contents import beside
from jaxinfer.places import check_new, file_system, locate, reached

Format = Literal["orbax", "hf"]
STORES = ("gs://", "s3://")  # that Orbax knows
CLAIM = ".jaxinfer-claim"  # in an object store: somebody is writing this folder


def check_destination(output: str, format: Format) -> None:
    """Raises what check_output raises, and ValueError for a place that the format can't be written to, or read from
    again: Orbax takes some characters of names for patterns and URLs."""
    if format not in get_args(Format):
        raise ValueError(f"format is {format!r}: it must be one of {', '.join(get_args(Format))}")
    fs, path = check_output(output)
    if not isinstance(fs, LocalFileSystem):
        if format == "hf":
            raise ValueError(f"output {output}: format hf is written into a folder here, and can then be copied")
        if not output.startswith(STORES):
            raise ValueError(f"output {output}: Orbax writes folders and {', '.join(STORES)}: give one of these")
    elif format == "orbax":
        parts = path.split("/")
        wrong = [part for part in parts if "\\" in part or f"{part}//" in STORES]
        wrong += [part for part in parts[:-1] if re.search(r"\[.+\]", part)]
        if wrong:
            raise ValueError(f"output {output}: Orbax can't use a folder called {wrong[0]!r}: give a place without it")


def check_output(output: str) -> tuple[Any, str]:
    """The file system of a folder or URL, and the path in it. Raises ValueError if it is no place, if something is
    there, or if nothing can be made there, which is tried; and OSError for a store that can't be reached."""
    fs, path = locate(output, "output")
    if isinstance(fs, LocalFileSystem):
        check_new(path, f"output {output}")
        return fs, path
    with reached(f"output {output}"):
        there = fs.exists(path)
    if there:
        raise ValueError(f"output {output}: is there already: give another name, or remove it first")
    return fs, path


@contextlib.contextmanager
def written(output: str) -> Iterator[str]:
    """Where to write what is to become the folder `output`. A local one has another name until all is written;
    elsewhere nothing can be renamed, so what must be there for others to take it as whole is to be written last, and
    who comes first claims the place. Raises what check_output raises, and OSError if another was first."""
    fs, path = check_output(output)
    if isinstance(fs, LocalFileSystem):
        with renamed(path) as target:
            yield target
        return
    with reached(f"output {output}"):
        try:
            fs.pipe_file(f"{path}/{CLAIM}", b"", mode="create")
        except FileExistsError:
            raise _taken(output) from None
    try:
        yield output.rstrip("/")
    finally:
        with contextlib.suppress(Exception):  # of a store that can't be reached any more: what was raised then counts
            fs.rm_file(f"{path}/{CLAIM}")


@contextlib.contextmanager
def renamed(path: str, replaces: bool = False) -> Iterator[str]:
    """A new local folder, which is called `path` when all is written, and is gone if that fails. replaces: the one that
    has this name until then. Its name until then is nobody else's. Raises OSError if another took the name first."""
    with _temporary(path) as target:
        yield target
        old = unused(path)
        if replaces:
            with contextlib.suppress(FileNotFoundError):
                os.rename(path, old)
        try:
            os.rename(target, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.rename(old, path)
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise _taken(path) from None
            raise
        finally:
            shutil.rmtree(old, ignore_errors=True)


def _taken(output: str) -> OSError:
    return OSError(
        f"output {output}: another process has written it, or is about to; what was made here is removed: give another "
        "name, or remove the other"
    )


@contextlib.contextmanager
def _temporary(path: str) -> Iterator[str]:
    """A folder beside `path` that is gone at the end. A lock on it, which ends with its process, says that somebody is
    at work there; those without, of processes that were killed, are removed first."""
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    for name in os.listdir(folder):
        if re.fullmatch(rf"{re.escape(_stem(path))}\.[0-9a-f]{{8}}\.tmp", name):
            with contextlib.suppress(OSError), _locked(left := os.path.join(folder, name)):
                shutil.rmtree(left)
    with contextlib.ExitStack() as stack:
        target = ""
        while not os.path.exists(target):
            os.mkdir(target := unused(path))
            try:
                stack.enter_context(_locked(target))
            except (BlockingIOError, FileNotFoundError):
                target = ""  # another has just taken it for one that is left behind
            except OSError:
                pass  # a file system without locks
        try:
            yield target
        finally:
            shutil.rmtree(target, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: str) -> Iterator[None]:
    """Raises OSError if that can't be, BlockingIOError if it is because another has locked it."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(file)


def _stem(path: str) -> str:
    """Orbax takes some characters for patterns, and names may be as long as a file system allows."""
    return "." + re.sub(r"[^\w.-]", "_", os.path.basename(path), flags=re.ASCII)[:80]


def unused(path: str) -> str:
    """The name of something beside `path` that is not there."""
    return os.path.join(os.path.dirname(path), f"{_stem(path)}.{secrets.token_hex(4)}.tmp")


@contextlib.contextmanager
def whole(path: str) -> Iterator[str]:
    """The name of a file to write, which is at `path` as a whole when the block ends well, and else is not there."""
    temporary = unused(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def put(path: str, content: bytes) -> None:
    """Writes a file of a folder or URL that is being written."""
    fs, inside = file_system(path)
    if isinstance(fs, LocalFileSystem):
        os.makedirs(os.path.dirname(inside), exist_ok=True)
    fs.pipe_file(inside, content)


def put_beside(folder: Path, path: str) -> None:
    """Copies the files of a checkpoint that are neither weights nor config.json. Raises ValueError for a link that
    leads out of the folder."""
    for name in beside(folder):
        put(f"{path}/{name}", (folder / name).read_bytes())
