"""JAX's persistent compilation cache, on by default: the second start compiles nothing."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

VARIABLE = "JAXINFER_CACHE_DIR"


def enable_compile_cache() -> None:
    """Points JAX at the cache: $JAXINFER_CACHE_DIR ("off" for none), else where JAX is already told to keep it, else
    the user's cache folder. Raises ValueError if the folder can't be written.
    """
    import jax
    import platformdirs

    named = os.environ.get(VARIABLE) or jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if named == "off":
        return
    folder = Path(named).expanduser() if named else Path(platformdirs.user_cache_dir("jaxinfer")) / "programs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"cache folder {folder} can't be written ({error.strerror}): set {VARIABLE} to a folder that can be, "
            "or to off to compile anew each time"
        ) from None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # JAX skips programs that compile in under a second; a small model's all do, and a start has many of them.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
