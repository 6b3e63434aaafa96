"""Converted checkpoints in object stores: all but their weights comes into a local folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from jaxinfer.checkpoint.orbax import MANIFEST, WEIGHTS


def fetch(url: str) -> Path:
    """A local folder with the small files of the converted checkpoint at `url`, whose weights stay where they are.

    Raises ValueError for a scheme that there is no file system for, and FileNotFoundError if no conversion was ended
    there.
    """
    url = url.rstrip("/")
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise ValueError(f"{url}: {error}") from None
    try:
        manifest = json.loads(fs.cat_file(f"{path}/{MANIFEST}"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{url}: no {MANIFEST}: nothing that jaxinfer convert has written to the end; other checkpoints must be "
            "in a local folder or on the hub"
        ) from None
    except ValueError as error:
        raise ValueError(f"{url}/{MANIFEST}: not JSON: {error}") from None
    if isinstance(fs, LocalFileSystem):
        return Path(path)
    from platformdirs import user_cache_dir

    folder = Path(user_cache_dir("jaxinfer")) / "checkpoints" / hashlib.sha256(url.encode()).hexdigest()[:16]
    folder.parent.mkdir(parents=True, exist_ok=True)
    fetched = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        for file in fs.ls(path, detail=False):
            if fs.isfile(file):
                (fetched / os.path.basename(file)).write_bytes(fs.cat_file(file))
        (fetched / MANIFEST).write_text(json.dumps(manifest | {"weights": f"{url}/{WEIGHTS}"}))
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(fetched, folder)
    except BaseException:
        shutil.rmtree(fetched, ignore_errors=True)
        raise
    return folder
