"""Programs that were compiled ahead, by `jaxinfer compile`: a folder with a file a program and a manifest.

The manifest says what they were compiled for, and everything in it is checked before a byte of a program is looked at.
A program is in JAX's own format (jax.experimental.serialize_executable), which has pickle inside: such a folder is as
trusted as code. It is read only where somebody names it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from jaxinfer.engine.config import check_options, which
from jaxinfer.engine.programs import Key, ModelPrograms
from jaxinfer.engine.serialized import (
    deserialize,
    environment,
    signature,
)
from jaxinfer.engine.sizing import Sizes, most_snapshots
from jaxinfer.models.config import ModelConfig, describe_config
from jaxinfer.models.registry import parse_config
from jaxinfer.places import locate
from jaxinfer.sharding import parse_mesh

log = logging.getLogger("jaxinfer")

FORMAT = 1
MANIFEST = "manifest.json"


OPTIONS = set(which(shapes_programs=True))
ENTRY = {"bytes": int, "sha256": str, "signature": str}


@dataclass(frozen=True)
class Manifest:
    """What a folder of programs is for.

    environment: of `environment()`.
    model: of `describe_config()`.
    options: those of `LLM` that shape the programs, all of them.
    attention: what attends to each cache group.
    sizes: as in Sizes; of models without a cache nothing.
    programs: by name, each file's `bytes`, `sha256`, and `signature` of its arguments.
    pooler: what makes vectors of hidden states, in words; "None": a head makes classes. Of models with a cache "".
    format: of the manifest itself.
    """

    environment: dict[str, Any]
    model: dict[str, Any]
    options: dict[str, Any]
    attention: list[str]
    sizes: dict[str, int]
    programs: dict[str, dict[str, Any]]
    pooler: str = ""
    format: int = field(default=FORMAT)

    def dump(self) -> bytes:
        return (json.dumps(dataclasses.asdict(self), indent=1) + "\n").encode()

    @staticmethod
    def parse(content: bytes) -> Manifest:
        """Raises ValueError saying what is wrong with it."""
        try:
            data = json.loads(content)
        except (ValueError, RecursionError):
            raise ValueError(f"{MANIFEST} is damaged") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"{MANIFEST} is not one of this version of jaxinfer")
        try:
            manifest = Manifest(**data)
            sizes = {} if manifest.pooler else dataclasses.asdict(Sizes(**manifest.sizes))
            least = {"snapshots": 0}
            whole = all(type(n) is int and least.get(name, 1) <= n < 2**63 for name, n in sizes.items())
            whole &= isinstance(manifest.pooler, str)
            whole &= isinstance(manifest.environment["devices"], list) and bool(manifest.environment["devices"])
            for entry in manifest.programs.values():
                whole &= {name: type(value) for name, value in entry.items()} == ENTRY and entry["bytes"] >= 0
        except (TypeError, AttributeError, KeyError):
            whole = False
        if not whole:
            raise ValueError(f"{MANIFEST} is damaged")
        return manifest


def name_of(key: Key) -> str:
    """Of a program: "step_32_8"."""
    return "_".join(map(str, key)).replace(" ", "_")


def file_of(name: str) -> str:
    return f"{name}.xla"


class Folder:
    """A folder of programs for this machine and this model. on_progress: told what is wrong, as the log is."""

    def __init__(self, name: str, manifest: Manifest, on_progress: Callable[[str], None]):
        self.name, self.manifest, self.on_progress = name, manifest, on_progress

    @property
    def sizes(self) -> Sizes:
        """Of the cache."""
        return Sizes(**self.manifest.sizes)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.manifest.dump()).hexdigest()[:12]

    def complain(self, problem: str) -> None:
        """Says why the folder is not used."""
        _say(self.name, f"not used: {problem}", self.on_progress)

    def fetch(self, programs: ModelPrograms, key: Key) -> Any:
        """The program, ready to be called; None, and a warning that says why, if it isn't what the manifest says."""
        name = name_of(key)
        entry = self.manifest.programs.get(name)
        try:
            if entry is None:
                raise ValueError("it is not there")
            if entry["signature"] != signature(programs, key):
                raise ValueError("its arguments are not those that are needed")
            fs, path = locate(self.name, "compiled")
            path = f"{path}/{file_of(name)}"
            if (size := fs.size(path)) != entry["bytes"]:
                raise ValueError(f"it has {size} bytes instead of {entry['bytes']}")
            content = fs.cat_file(path)
            if hashlib.sha256(content).hexdigest() != entry["sha256"]:
                raise ValueError("its digest is not the manifest's")
            return deserialize(programs, key, content)
        except FileNotFoundError:
            why = "its file is not there"
        except (ValueError, OSError) as error:
            why = " ".join(str(error).split())
        _say(self.name, f"program {name}: {why}; it is compiled now", self.on_progress)
        return None


def open_folder(
    name: str | os.PathLike[str],
    config: Mapping[str, Any],
    devices: Sequence[jax.Device],
    options: Mapping[str, Any],
    on_progress: Callable[[str], None],
    pooler: str = "",
) -> Folder | None:
    """The folder, if it is for this machine, this model and the `options` that are given (those with None are not).

    pooler: as in Manifest. Otherwise None, and a warning that says exactly what differs. Raises FileNotFoundError if
    there is no such folder.
    """
    name = os.fspath(name)
    fs, path = locate(name, "compiled")
    try:
        content = fs.cat_file(f"{path}/{MANIFEST}")
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"{name}: no {MANIFEST}: it is not a folder that jaxinfer compile has written to the end"
        ) from None
    try:
        manifest = Manifest.parse(content)
        if manifest.options.keys() != OPTIONS:
            raise ValueError(f"{MANIFEST} is damaged: its options are not those that shape programs")
        check_options(manifest.options)
        differences = _differences(manifest, config, devices, options)
        differences += _compare("what is done with", {"hidden states": manifest.pooler}, {"hidden states": pooler})
    except ValueError as error:
        differences = [str(error)]
    except (KeyError, TypeError, AttributeError, RecursionError):
        differences = [f"{MANIFEST} is damaged"]
    if not differences:
        return Folder(name, manifest, on_progress)
    _say(name, f"not used: {'; '.join(differences)}", on_progress)
    return None


def _say(name: str, what: str, on_progress: Callable[[str], None]) -> None:
    what = " ".join(what[:2000].split()) + ("..." if len(what) > 2000 else "")
    log.warning("compiled programs in %s: %s", name, what)
    on_progress(what)


def _differences(
    manifest: Manifest, config: Mapping[str, Any], devices: Sequence[jax.Device], options: Mapping[str, Any]
) -> list[str]:
    old = manifest.environment
    count = len(old["devices"])
    here = environment(devices[:count])
    if old["device"] != here["device"]:
        return [f"compiled for {count} devices of {old['device']}, and this is {here['device']}"]
    if count > len(devices):
        return [f"compiled for {count} devices, and there are {len(devices)}"]
    differences = [
        f"compiled for {name} {old[name]}, and this is {here[name]}"
        for name in ("jaxinfer", "jax", "jaxlib", "runtime")
        if old[name] != here[name]
    ]
    others = [(was, now) for was, now in zip(old["devices"], here["devices"], strict=True) if was != now]
    if others:
        differences.append(f"compiled for {others[0][0]}, and this is {others[0][1]}")
    if lacking := [feature for feature in old.get("features", []) if feature not in here.get("features", [])]:
        differences.append(f"compiled for a CPU with {', '.join(lacking)}")
    differences += _compare("setting", old["settings"], here["settings"])
    model = parse_config(config)[1].for_length(manifest.options["max_model_len"])
    differences += _compare("the model's", manifest.model, describe_config(model))
    differences += _contradictions(manifest, model)
    asked = {name: value for name, value in options.items() if name in manifest.options and value not in (None, "auto")}
    if "mesh" in asked and parse_mesh(asked["mesh"]) == parse_mesh(manifest.options["mesh"]):
        del asked["mesh"]
    return differences + _compare("option", {name: manifest.options[name] for name in asked}, asked)


def _contradictions(manifest: Manifest, model: ModelConfig) -> list[str]:
    """Sizes that are not those of the options. That there is memory for them, and one of them for a sequence, is seen
    once it is known what layers keep."""
    if manifest.pooler:
        return []
    sizes, options = Sizes(**manifest.sizes), manifest.options
    longest = -(-sizes.max_model_len // sizes.page_size)
    fits = (
        sizes.page_size == options["page_size"]
        and sizes.max_model_len == options["max_model_len"]
        and sizes.max_model_len <= model.max_context
        and sizes.num_pages <= longest * model.num_layers * options["max_num_seqs"] + 1
        and sizes.snapshots <= most_snapshots(options["max_num_seqs"])
    )
    return [] if fits else [f"{MANIFEST} contradicts itself: its sizes are not those of its options"]


def _compare(what: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    names = [*old, *(name for name in new if name not in old)]
    return [
        f"{what} {name} was {old.get(name)!r} and is {new.get(name)!r}"
        for name in names
        if old.get(name) != new.get(name)
    ]
