"""JAX's persistent compilation cache, on by default: the second start compiles nothing."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

VARIABLE = "JAXINFER_CACHE_DIR"


def enable_compile_cache() -> None:
    """Points JAX at the cache: $JAXINFER_CACHE_DIR ("off" for none), else where JAX is already told to keep it, else
    the user's cache folder. What can be written at a URL (gs://...) JAX finds out when it writes.

    Raises ValueError if the folder can't be written, or if JAX knows no such URLs.
    """
    import jax
    import platformdirs

    named = os.environ.get(VARIABLE) or jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if named == "off":
        return
    if named and "://" in named:
        kept = _known_url(named)
    else:
        kept = _local_folder(named or os.path.join(platformdirs.user_cache_dir("jaxinfer"), "programs"))
    jax.config.update("jax_compilation_cache_dir", kept)
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

    before = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # or JAX would not look at that again
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()
