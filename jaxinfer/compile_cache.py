"""Where compiled programs are kept for the next start: in a folder of ours (`engine/executables.py`), or by JAX."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

VARIABLE = "JAXINFER_CACHE_DIR"
_switching = threading.Lock()
_before: list[bool] = []  # whether JAX's cache was on, by each thread that is without it now


def cache_folder() -> str | None:
    """A folder or a URL: $JAXINFER_CACHE_DIR, None for "off"; else where JAX is already told to keep it; else in the
    user's cache folder. What can be written at a URL (gs://...) JAX finds out when it writes.

    Raises ValueError if the folder can't be written, or if JAX knows no such URLs.
    """
    import jax
    import platformdirs

    named = os.environ.get(VARIABLE) or jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if named == "off":
        return None
    if named and "://" in named:
        return _known_url(named)
    return _local_folder(named or os.path.join(platformdirs.user_cache_dir("jaxinfer"), "programs"))


def executables_folder() -> Path | None:
    """Where our own are kept; None where that is off, or JAX keeps them: at a URL, or because somebody told JAX to."""
    import jax

    folder = cache_folder()
    alone = jax.config.jax_compilation_cache_dir is None  # type: ignore[attr-defined]
    return Path(folder) if folder is not None and "://" not in folder and alone else None


def enable_compile_cache() -> None:
    """Has JAX keep them. Raises ValueError: see `cache_folder`."""
    import jax

    folder = cache_folder()
    if folder is None:
        return
    jax.config.update("jax_compilation_cache_dir", folder)
    # JAX skips programs that compile in under a second; a small model's all do, and a start has many of them.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _known_url(url: str) -> str:
    from etils import epath  # JAX keeps its cache by way of it

    try:
        epath.Path(url)
    except KeyError:
        raise ValueError(
            f"cache folder {url}: JAX knows no such URLs: set {VARIABLE} to gs://..., to a folder, or to off to "
            "compile anew each time"
        ) from None
    return url


def _local_folder(name: str) -> str:
    folder = Path(name).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"cache folder {folder} can't be written ({error.strerror}): set {VARIABLE} to a folder that can be, "
            "or to off to compile anew each time"
        ) from None
    return str(folder)


@contextlib.contextmanager
def without_compile_cache() -> Iterator[None]:
    """For what is compiled to be written elsewhere, or for devices that are not there. What comes out of the cache on
    CPU can't be written again, and nothing says so; what is for devices that are not there can't be taken out."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    def enable(value: bool) -> None:
        jax.config.update("jax_enable_compilation_cache", value)
        compilation_cache.reset_cache()  # or JAX would not look at that again

    with _switching:
        if not _before:
            _before.append(jax.config.jax_enable_compilation_cache)  # type: ignore[attr-defined]
            enable(False)
        else:
            _before.append(_before[0])
    try:
        yield
    finally:
        with _switching:
            before = _before.pop()
            if not _before:  # the last of several threads
                enable(before)
