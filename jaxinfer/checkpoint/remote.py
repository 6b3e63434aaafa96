"""Converted checkpoints in object stores: all but their weights comes into a local folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from jaxinfer.checkpoint.contents import BESIDE, TEMPLATES, belonging
from jaxinfer.checkpoint.files import MAX_JSON_BYTES
from jaxinfer.checkpoint.orbax import MANIFEST
from jaxinfer.checkpoint.output import renamed
from jaxinfer.places import inside, locate, reached

URL = ".url"


def fetch(url: str) -> Path:
    """A local folder with the small files of the converted checkpoint at `url`, whose weights stay where they are.

    Raises ValueError for a scheme that there is no file system for, FileNotFoundError if no conversion was ended
    there, and other OSErrors if it can't be reached.
    """
    url = url.rstrip("/")
    fs, path = locate(url, "model")
    with reached(url):
        if not fs.exists(f"{path}/{MANIFEST}"):
            raise FileNotFoundError(
                f"{url}: no {MANIFEST}: nothing that jaxinfer convert has written to the end; other checkpoints must "
                "be in a local folder or on the hub"
            )
        if isinstance(fs, LocalFileSystem):
            return Path(path)
        files = _read(fs, path, url)
    digest = hashlib.sha256(url.encode())
    for name, content in files.items():
        digest.update(f"\0{name}\0{len(content)}\0".encode() + content)
    # Named by its content: a folder that others may be reading, or making at the same time, never changes.
    entry = _cache() / digest.hexdigest()[:24]
    folder = entry / os.path.basename(url)
    there = entry.exists()
    if not _holds(folder, files):
        try:
            # Only what was damaged before is replaced: meanwhile the name is nobody's, and others may be reading.
            with renamed(str(entry), replaces=there) as new:
                os.mkdir(os.path.join(new, folder.name))
                Path(new, URL).write_text(url)
                for name, content in files.items():
                    file = inside(os.path.join(new, folder.name), name, f"{url}: file")
                    file.parent.mkdir(exist_ok=True)
                    file.write_bytes(content)
        except OSError:
            if not (folder / MANIFEST).is_file():  # else another was first, with the same files
                raise
    return folder


def _holds(folder: Path, files: dict[str, bytes]) -> bool:
    try:
        return all((folder / name).read_bytes() == content for name, content in files.items())
    except OSError:
        return False


def origin(folder: Path) -> str | None:
    """The URL of a folder that `fetch` has made, where its weights are. No file of the folder itself says it."""
    entry = Path(os.path.abspath(folder)).parent
    return (entry / URL).read_text() if entry.parent == _cache() and (entry / URL).is_file() else None


def _cache() -> Path:
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("jaxinfer")).absolute() / "checkpoints"


def _read(fs: Any, path: str, url: str) -> dict[str, bytes]:
    """The files that a checkpoint has beside its weights. Raises ValueError for one that is too large."""
    sizes: dict[str, int] = {}
    for directory in (path, *(f"{path}/{pattern.split('/')[0]}" for pattern in TEMPLATES)):
        with contextlib.suppress(FileNotFoundError):
            sizes |= {
                info["name"].removeprefix(path).lstrip("/"): info["size"]
                for info in fs.ls(directory, detail=True)
                if info["type"] == "file"
            }
    names = belonging(sizes, BESIDE, ())
    large = [name for name in names if sizes[name] > MAX_JSON_BYTES]
    if large:
        raise ValueError(f"{url}/{large[0]}: has {sizes[large[0]]} bytes, and {MAX_JSON_BYTES} are read: remove it")
    return {name: fs.cat_file(f"{path}/{name}") for name in names}
