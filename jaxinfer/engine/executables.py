"""Compiled programs of earlier starts, kept on this machine: a start that finds them traces and compiles nothing.

JAX's own cache goes by the lowered program, and making that again is most of a warm start. Here a program is found by
what it is made from: versions and sources, device, settings, model, sizes. Executables are in JAX's format, which has
pickle inside, so they are read from a folder that nobody else can write, and from nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import jax

from jaxinfer.engine.compiled import file_of, name_of
from jaxinfer.engine.programs import Key, ModelPrograms
from jaxinfer.engine.serialized import code, deserialize, environment, serialize, signature
from jaxinfer.models.declared import Declarations
from jaxinfer.private_folder import PrivateFolder

log = logging.getLogger("jaxinfer")

MOST = 32  # engines whose programs are kept; of more, those that were used longest ago go


class ExecutableCache:
    """The programs of one engine.

    folder: theirs and those of others.
    own: the name of the folder in it that has theirs alone; it says what they are made from.
    loaded: how many were found.
    """

    def __init__(self, folder: PrivateFolder, own: str):
        self.folder, self.own = folder, own
        self.loaded = 0

    def fetch(self, programs: ModelPrograms, key: Key) -> jax.stages.Compiled | None:
        """The program, ready to be called; None if it is not there. One that can't be read is removed, and said."""
        name = self._name(programs, key)
        path = self.folder.path / name
        try:
            executable = deserialize(programs, key, self.folder.read(name))
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("%s: %s; the program is compiled now", path, error.strerror)
            return None
        except ValueError as error:
            log.warning("%s: %s; it is removed, and the program compiled now", path, " ".join(str(error).split())[:500])
            self.folder.remove(name)
            return None
        self.loaded += 1
        return executable

    def store(self, programs: ModelPrograms, key: Key, executable: jax.stages.Compiled) -> None:
        """Keeps a program that was compiled just now."""
        if jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
            return  # what comes out of JAX's cache can't be written again on CPU, and nothing says so
        name = self._name(programs, key)
        path = self.folder.path / name
        try:
            content = serialize(programs, key, executable)
        except Exception as error:  # of a runtime that does not write programs
            log.info("%s: the program is not kept for the next start: %s", path, error)
            return
        try:
            self.folder.write(name, content)
        except OSError as error:
            log.warning("%s: %s; the program is not kept for the next start", path, error.strerror)

    def _name(self, programs: ModelPrograms, key: Key) -> str:
        return f"{self.own}/{signature(programs, key)[:16]}-{file_of(name_of(key))}"


def open_declarations(root: Path) -> Declarations:
    """What architectures said in earlier starts, in the folder `root` beside the programs."""
    path = root / "declarations"
    try:
        return Declarations(PrivateFolder(path), code())
    except OSError as error:
        log.warning("%s is not used for what models declare: %s", path, error.strerror)
        return Declarations()


def open_executables(root: Path, programs: ModelPrograms) -> ExecutableCache | None:
    """Those of this engine in the folder `root`, which is made if need be. None, and a line in the log that says why,
    if others could write there. None too for a family from outside of the package: nobody sees a change of its code."""
    if not programs.model.built_in:
        return None
    path, own = root / "executables", _digest(programs)
    try:
        folder = PrivateFolder(path)
    except OSError as error:
        log.warning("%s is not used for compiled programs: %s", path, error.strerror)
        return None
    folder.use(own, MOST)
    return ExecutableCache(folder, own)


def _digest(programs: ModelPrograms) -> str:
    """Of what all programs of an engine are made from, but for their arguments, of which each has a signature."""
    model = programs.model
    facts: dict[str, Any] = {
        "environment": environment(programs.devices),
        "model": model.declared.described,
        "dtypes": [str(model.dtype), str(model.weight_dtype)],
        "quantized": {name: str(scheme) for name, scheme in model.quantized.items()},
        **programs.facts,
        "options": {name: str(value) for name, value in programs.options.items()},  # of adapters' slots, too
        "mesh": None if programs.mesh is None else dict(programs.mesh.shape),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
