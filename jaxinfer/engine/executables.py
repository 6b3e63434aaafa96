"""Compiled programs of earlier starts, kept on this machine: a start that finds them traces and compiles nothing.

JAX's own cache goes by the lowered program, and making that again is most of a warm start. Here a program is found by
what it is made from: versions and sources, device, settings, model, sizes. Executables are in JAX's format, which has
pickle inside, so they are read from a folder that nobody else can write, and from nowhere else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import stat
import tempfile
from pathlib import Path
from typing import Any

import jax
import psutil

from jaxinfer.engine.compiled import file_of, name_of
from jaxinfer.engine.programs import Key, Programs
from jaxinfer.engine.serialized import describe_config, deserialize, environment, serialize, signature

log = logging.getLogger("jaxinfer")

MOST = 32  # engines whose programs are kept; of more, those that were used longest ago go
DIGEST = 32  # bytes of SHA-256, before each program's own
SHARED = ("nfs", "cifs", "smb", "fuse", "9p", "lustre", "gpfs", "ceph", "afs", "beegfs", "virtiofs")  # file systems


class ExecutableCache:
    """The programs of one engine.

    folder: theirs alone, of a name that says what they are made from.
    loaded: how many were found.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.loaded = 0

    def fetch(self, programs: Programs, key: Key) -> jax.stages.Compiled | None:
        """The program, ready to be called; None if it is not there. One that can't be read is removed, and said."""
        path = self._path(programs, key)
        try:
            content = _read(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("%s: %s; the program is compiled now", path, error.strerror)
            return None
        try:
            if hashlib.sha256(content[DIGEST:]).digest() != content[:DIGEST]:
                raise ValueError("it is damaged")
            executable = deserialize(programs, key, content[DIGEST:])
        except ValueError as error:
            log.warning("%s: %s; it is removed, and the program compiled now", path, " ".join(str(error).split())[:500])
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        self.loaded += 1
        return executable

    def store(self, programs: Programs, key: Key, executable: jax.stages.Compiled) -> None:
        """Keeps a program that was compiled just now."""
        if jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
            return  # what comes out of JAX's cache can't be written again on CPU, and nothing says so
        path = self._path(programs, key)
        try:
            content = serialize(programs, key, executable)
        except Exception as error:  # of a runtime that does not write programs
            log.info("%s: the program is not kept for the next start: %s", path, error)
            return
        try:
            self.folder.mkdir(mode=0o700, exist_ok=True)
            # Of two that write the same program one stays, whole.
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".", delete=False) as file:
                try:
                    file.write(hashlib.sha256(content).digest() + content)
                    file.close()
                    os.replace(file.name, path)
                except BaseException:
                    os.unlink(file.name)
                    raise
        except OSError as error:
            log.warning("%s: %s; the program is not kept for the next start", path, error.strerror)

    def _path(self, programs: Programs, key: Key) -> Path:
        return self.folder / f"{signature(programs, key)[:16]}-{file_of(name_of(key))}"


def open_executables(root: Path, programs: Programs) -> ExecutableCache | None:
    """Those of this engine in the folder `root`, which is made if need be. None, and a line in the log that says why,
    if others could write there. None too for a family from outside of the package: nobody sees a change of its code."""
    if not programs.model.built_in:
        return None
    folder = root / "executables"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        problem = _problem(folder)
    except OSError as error:
        problem = error.strerror or str(error)
    if problem is not None:
        log.warning("%s is not used for compiled programs: %s", folder, problem)
        return None
    own = folder / _digest(programs)
    with contextlib.suppress(OSError):
        if own.exists():
            os.utime(own)
        for old in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)[MOST:]:
            shutil.rmtree(old, ignore_errors=True)
    return ExecutableCache(own)


def _digest(programs: Programs) -> str:
    """Of what all programs of an engine are made from, but for their arguments, of which each has a signature."""
    model = programs.model
    facts: dict[str, Any] = {
        "environment": environment(programs.devices),
        "model": describe_config(model.config),
        "dtypes": [str(model.dtype), str(model.weight_dtype)],
        "quantized": {name: str(scheme) for name, scheme in model.quantized.items()},
        "attention": programs.layout.names,
        "sizes": [
            str(programs.buckets),
            programs.page_counts,
            programs.page_size,
            programs.max_model_len,
            programs.max_rows,
            programs.max_steps,
        ],
        "mesh": None if programs.mesh is None else dict(programs.mesh.shape),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _problem(folder: Path) -> str | None:
    """Why executables in a folder can't be trusted, or None."""
    if not hasattr(os, "getuid"):
        return "this system does not say who can write there"
    about = folder.lstat()
    if not stat.S_ISDIR(about.st_mode):
        return "it is a link, or no folder; remove it"
    if about.st_uid != os.getuid():
        return f"it belongs to user {about.st_uid}, and this is user {os.getuid()}"
    if about.st_mode & 0o077:
        return f"others may use it (mode {stat.S_IMODE(about.st_mode):04o}): remove it, or chmod 700"
    above = folder.parent.stat()
    if above.st_uid not in (os.getuid(), 0) or (above.st_mode & 0o022 and not above.st_mode & stat.S_ISVTX):
        return f"others may write in {folder.parent}: chmod go-w, or set JAXINFER_CACHE_DIR to another folder"
    kind = _file_system(folder)
    if kind.startswith(SHARED):
        return f"it is on a file system that other machines share ({kind}): set JAXINFER_CACHE_DIR to a local folder"
    return None


def _file_system(folder: Path) -> str:
    """Its type, as the system calls it; empty where it says none."""
    path = os.path.realpath(folder)
    mounts = [mount for mount in psutil.disk_partitions(all=True) if _within(path, mount.mountpoint)]
    return max(mounts, key=lambda mount: len(mount.mountpoint)).fstype.lower() if mounts else ""


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(os.path.join(folder, ""))


def _read(path: Path) -> bytes:
    """A file of this user's own; links are not followed. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    with open(descriptor, "rb") as file:
        return file.read()
