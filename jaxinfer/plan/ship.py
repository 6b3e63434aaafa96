"""A whole table of programs, compiled ahead into a folder that `LLM(..., compiled=FOLDER)` reads."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from jaxinfer.checkpoint.output import renamed, unused
from jaxinfer.compile_cache import without_compile_cache
from jaxinfer.engine.background import in_background
from jaxinfer.engine.compiled import MANIFEST, Manifest, file_of, name_of
from jaxinfer.engine.programs import Key, ModelPrograms
from jaxinfer.engine.serialized import environment, serialize, signature
from jaxinfer.engine.sizing import Sizes
from jaxinfer.places import check_new, locate, reached


@dataclass(frozen=True)
class Shipped:
    """What was written.

    programs: how many executables.
    bytes: of all of them.
    seconds: that it took.
    """

    programs: int
    bytes: int
    seconds: float


def ship(programs: ModelPrograms, sizes: Sizes | None, output: str, on_program: Callable[[], Any]) -> Shipped:
    """Compiles every program, several at a time, into a folder or URL that is there as a whole or not at all.

    sizes: of the cache; None: there is none. on_program: called when one is written. Raises ValueError if `output` is
    something else already, and OSError if it can't be written.
    """
    start = time.perf_counter()
    keys = programs.keys()
    written: dict[str, dict[str, Any]] = {}
    with (
        _folder(output) as write,
        without_compile_cache(),
        in_background(functools.partial(_compile, programs), keys) as futures,
    ):
        of = dict(zip(futures, keys, strict=True))
        futures.clear()  # a program that is written need not stay in memory
        for future in as_completed(of):
            key = of.pop(future)
            content = future.result()
            write(file_of(name_of(key)), content)
            digest = hashlib.sha256(content).hexdigest()
            written[name_of(key)] = {"bytes": len(content), "sha256": digest, "signature": signature(programs, key)}
            on_program()
        write(MANIFEST, _manifest(programs, sizes, {name_of(key): written[name_of(key)] for key in keys}).dump())
    return Shipped(len(keys), sum(entry["bytes"] for entry in written.values()), time.perf_counter() - start)


def _compile(programs: ModelPrograms, key: Key) -> bytes:
    return serialize(programs, key, programs[key].lower().compile())


def _manifest(programs: ModelPrograms, sizes: Sizes | None, written: dict[str, dict[str, Any]]) -> Manifest:
    model, facts = json.loads(programs.model.declared.described), programs.facts
    attention, cache = facts.get("attention", []), {} if sizes is None else asdict(sizes)
    return Manifest(
        environment(programs.devices), model, programs.options, attention, cache, written, facts.get("pooler", "")
    )


def check_folder(output: str) -> tuple[Any, str]:
    """The file system of a folder or URL of programs, new or not, and the path in it. Raises ValueError if it is
    something else already, or if it can't be made, which is tried."""
    fs, path = locate(output, "output")
    local, where = isinstance(fs, LocalFileSystem), f"output {output}"
    with reached(where):
        there = fs.exists(path)
        strange = there and not fs.exists(f"{path}/{MANIFEST}") and (not fs.isdir(path) or (local and fs.ls(path)))
    if strange:
        raise ValueError(f"{where}: is there already, and is no folder of compiled programs: give another name")
    if local:
        check_new(unused(path) if there else path, where)
    return fs, path


@contextlib.contextmanager
def _folder(output: str) -> Iterator[Callable[[str, bytes], None]]:
    """What writes a file into the folder. A local one gets its name when all is written; elsewhere, where nothing can
    be renamed, an old manifest goes first, and the new one comes last. Of two that write there at once, one manifest
    stays, and programs of the other's don't have its digests."""
    fs, path = check_folder(output)
    local = isinstance(fs, LocalFileSystem)
    if not local:
        with contextlib.suppress(FileNotFoundError):
            fs.rm_file(f"{path}/{MANIFEST}")
    with renamed(path, replaces=True) if local else contextlib.nullcontext(path) as target:
        yield lambda name, content: fs.pipe_file(f"{target}/{name}", content)
