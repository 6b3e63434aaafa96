"""Where something is: what a user says is a path or a URL, what a file says is a name in its own folder and no more."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem


def inside(folder: str | os.PathLike[str], name: object, what: str) -> Path:
    """The path of `name`, which a file has said, in the folder. Whoever made the file does not choose what is opened:
    `name` is relative, has no protocol, and neither it nor a link on the way leads out of the folder. Links into
    `blobs` of the hub's cache, which snapshots consist of, are in it.

    what: says where the name comes from. Raises ValueError that begins with it.
    """
    parts = name.split("/") if isinstance(name, str) else []
    if not parts or {"", ".", ".."} & {*parts} or any(char in str(name) for char in "\\:\0"):
        raise ValueError(f"{what} is {name!a:.120}: it must be the name of something in {folder} itself")
    path = Path(folder, *parts)
    root, target = os.path.realpath(folder), os.path.realpath(path)
    roots = [root]
    if os.path.basename(os.path.dirname(root)) == "snapshots":
        roots.append(os.path.join(os.path.dirname(os.path.dirname(root)), "blobs"))
    if not any(target.startswith(os.path.join(parent, "")) for parent in roots):
        raise ValueError(f"{what}: {path} is a link that leads out of its folder: put a copy of the file there")
    return path


def file_system(urlpath: str) -> tuple[Any, str]:
    """fsspec's file system of a path or URL of our own making, and the path in it. A path is taken as it is."""
    return fsspec.core.url_to_fs(urlpath) if "://" in urlpath else (LocalFileSystem(), urlpath)


def locate(urlpath: str, what: str) -> tuple[Any, str]:
    """fsspec's file system of a path or URL that a user has given, and the path in it; absolute where it is local.

    what: says what it is. Raises ValueError that begins with it, for what is no place, and for URLs within others.
    """
    scheme = re.match(r"[A-Za-z][\w+.-]*(?=:/)", urlpath)
    try:
        if "::" in urlpath:
            raise ValueError("a URL within another; give one that has no ::")
        if scheme and "://" not in urlpath and scheme[0] in fsspec.available_protocols():
            raise ValueError(f"a URL that has lost a slash; give it as text, {scheme[0]}://...")
        if not urlpath or urlpath.endswith("://"):
            raise ValueError("a name is missing; give a folder or a URL")
        fs, path = file_system(urlpath if "://" in urlpath else os.path.expanduser(urlpath))
        if isinstance(fs, LocalFileSystem):
            path = os.path.abspath(path)
            path.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} {urlpath!a}: it is not UTF-8; give another name") from None
    except (ValueError, ImportError) as error:
        raise ValueError(f"{what} {urlpath}: {_one_line(error)}") from None
    return fs, path.rstrip("/") or path


def local(urlpath: str, what: str) -> str:
    """The absolute path of a place that must be on this machine. Raises ValueError that begins with `what`."""
    fs, path = locate(urlpath, what)
    if not isinstance(fs, LocalFileSystem):
        raise ValueError(f"{what} {urlpath}: is not on this machine; give a path here, and copy what was written there")
    return path


def check_kept(urlpath: str, what: str) -> None:
    """Raises ValueError for what a command would write and lose: fsspec's memory ends with the process."""
    if urlpath.startswith("memory:"):
        raise ValueError(f"{what} {urlpath}: is gone when the command ends; give a folder or a URL")


def check_new(path: str, what: str) -> None:
    """Raises ValueError that begins with `what` unless a local file or folder of this name can be made, which is tried
    beside it."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        parent = os.path.dirname(path)
        while not os.path.lexists(parent):
            parent = os.path.dirname(parent)
        try:
            os.rmdir(tempfile.mkdtemp(prefix=".", dir=parent))
        except OSError as error:
            raise ValueError(f"{what}: can't be made in {parent} ({error.strerror}): give another name") from None
    except (OSError, ValueError) as error:  # of a name with a null
        raise ValueError(f"{what}: can't be made ({getattr(error, 'strerror', error)}): give another name") from None
    else:
        raise ValueError(f"{what}: is there already: give another name, or remove it first")


@contextlib.contextmanager
def reached(urlpath: str) -> Iterator[None]:
    """Turns what stores raise, which can be anything, into an OSError of one line, unless it is one that says more."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError | FileNotFoundError) or error.errno is None:
            raise
        raise OSError(f"{urlpath}: can't be reached ({error.strerror or type(error).__name__})") from None
    except Exception as error:
        raise OSError(f"{urlpath}: can't be reached ({type(error).__name__}: {_one_line(error)})") from None


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:300]
