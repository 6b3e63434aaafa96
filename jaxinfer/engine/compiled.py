"""Programs that were compiled ahead, by `jaxinfer compile`: a folder with a file a program and a manifest.

The manifest says what they were compiled for, and everything in it is checked before a byte of a program is looked at.
A program is in JAX's own format (jax.experimental.serialize_executable), which has pickle inside: such a folder is as
trusted as code. It is read only where somebody names it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import platform
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

from jaxinfer import __version__
from jaxinfer.attention.fused import tokamax_version
from jaxinfer.engine.config import check_options, which
from jaxinfer.engine.programs import Key, Programs
from jaxinfer.engine.sizing import Sizes
from jaxinfer.kernels.cpu import kernels
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.model import AbstractModel
from jaxinfer.models.registry import parse_config
from jaxinfer.places import locate
from jaxinfer.sharding import parse_mesh

log = logging.getLogger("jaxinfer")

FORMAT = 1
MANIFEST = "manifest.json"
SETTINGS = ("enable_x64", "default_matmul_precision", "default_prng_impl", "threefry_partitionable")
# What of a CPU matters to a compiler; the rest of Linux's list changes with the kernel and the hypervisor.
FEATURES = re.compile(r"s?sse|avx|amx|fma|f16c|bmi|v?aes|v?pclmul|sha|gfni|popcnt|abm|movbe|adx|asimd|sve|fp(hp)?$")


OPTIONS = set(which(shapes_programs=True))
ENTRY = {"bytes": int, "sha256": str, "signature": str}


@dataclass(frozen=True)
class Manifest:
    """What a folder of programs is for.

    environment: of `environment()`.
    model: of `describe_model()`.
    options: those of `LLM` that shape the programs, all of them.
    attention: what attends to each cache group.
    sizes: as in Sizes.
    programs: by name, each file's `bytes`, `sha256`, and `signature` of its arguments.
    format: of the manifest itself.
    """

    environment: dict[str, Any]
    model: dict[str, Any]
    options: dict[str, Any]
    attention: list[str]
    sizes: dict[str, int]
    programs: dict[str, dict[str, Any]]
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
            whole = all(type(n) is int and 0 < n < 2**63 for n in dataclasses.astuple(Sizes(**manifest.sizes)))
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


def environment(devices: Sequence[jax.Device]) -> dict[str, Any]:
    """All that compiled programs depend on besides model and sizes. devices: those of the mesh, in its order."""
    kind = devices[0].platform
    facts: dict[str, Any] = {
        "jaxinfer": f"{__version__} ({_source()})",
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
        "device": kind if kind == "cpu" else devices[0].device_kind,
        "devices": [_place(device) for device in devices],
        "runtime": " ".join(devices[0].client.platform_version.split()),
        "settings": {name: getattr(jax.config, f"jax_{name}") for name in SETTINGS} | {"XLA_FLAGS": _flags()},
    }
    if kind == "cpu":
        facts["features"] = [platform.machine(), *cpu_features()]
        facts["settings"]["CPU kernels"] = kernels().level or "none"
    if kind == "tpu":
        facts["settings"]["tokamax"] = tokamax_version() or "none"
        facts["settings"]["LIBTPU_INIT_ARGS"] = os.environ.get("LIBTPU_INIT_ARGS", "")
    return _plain(facts)


def describe_model(model: AbstractModel) -> dict[str, Any]:
    """Everything of a model that a program depends on."""
    return _describe(model.config)


def _describe(config: ModelConfig) -> dict[str, Any]:
    return _plain({"class": type(config).__name__, **dataclasses.asdict(config)})


def signature(programs: Programs, key: Key) -> str:
    """Of a program's arguments and results: names, shapes, types and how they are split."""
    leaves = [(s.shape, str(s.dtype), _spec(s.sharding)) for s in jax.tree.leaves(programs[key].arguments)]
    text = f"{_trees(programs, key)} {leaves}"
    return hashlib.sha256(text.encode()).hexdigest()


def serialize(programs: Programs, key: Key, compiled: Any) -> bytes:
    """A compiled program in JAX's format."""
    content, *trees = serialize_executable.serialize(compiled)
    assert tuple(trees) == _trees(programs, key), key
    return content


class Folder:
    """A folder of programs for this machine and this model. on_progress: told what is wrong, as the log is."""

    def __init__(self, name: str, manifest: Manifest, on_progress: Callable[[str], None]):
        self.name, self.manifest, self.on_progress = name, manifest, on_progress
        self.sizes = Sizes(**manifest.sizes)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.manifest.dump()).hexdigest()[:12]

    def complain(self, problem: str) -> None:
        """Says why the folder is not used."""
        _say(self.name, f"not used: {problem}", self.on_progress)

    def fetch(self, programs: Programs, key: Key) -> Any:
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
            return _deserialize(programs, key, content)
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
) -> Folder | None:
    """The folder, if it is for this machine, this model and the `options` that are given (those with None are not).

    Otherwise None, and a warning that says exactly what differs. Raises FileNotFoundError if there is no such folder.
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
    model = parse_config(config)[1]
    differences += _compare("the model's", manifest.model, _describe(model))
    differences += _contradictions(manifest, model)
    asked = {name: value for name, value in options.items() if name in manifest.options and value not in (None, "auto")}
    if "mesh" in asked and parse_mesh(asked["mesh"]) == parse_mesh(manifest.options["mesh"]):
        del asked["mesh"]
    return differences + _compare("option", {name: manifest.options[name] for name in asked}, asked)


def _contradictions(manifest: Manifest, model: ModelConfig) -> list[str]:
    """Sizes that are not those of the options. That there is memory for them, and one of them for a sequence, is seen
    once it is known what layers keep."""
    sizes, options = Sizes(**manifest.sizes), manifest.options
    longest = -(-sizes.max_model_len // sizes.page_size)
    fits = (
        sizes.page_size == options["page_size"]
        and sizes.max_model_len == options["max_model_len"]
        and sizes.max_model_len <= model.max_context
        and sizes.num_pages <= longest * model.num_layers * options["max_num_seqs"] + 1
    )
    return [] if fits else [f"{MANIFEST} contradicts itself: its sizes are not those of its options"]


def _compare(what: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    names = [*old, *(name for name in new if name not in old)]
    return [
        f"{what} {name} was {old.get(name)!r} and is {new.get(name)!r}"
        for name in names
        if old.get(name) != new.get(name)
    ]


def _deserialize(programs: Programs, key: Key, content: bytes) -> Any:
    devices = programs.devices
    try:
        return serialize_executable.deserialize_and_load(
            content, *_trees(programs, key), backend=devices[0].client, execution_devices=devices
        )
    except Exception as error:  # of pickle, of what it calls, and of the runtime
        raise ValueError(f"JAX can't read it ({type(error).__name__}: {error})") from None


def _trees(programs: Programs, key: Key) -> tuple[Any, Any]:
    """Of arguments and results. JAX would have them pickled."""
    program = programs[key]
    return jax.tree.structure((program.arguments, {})), jax.tree.structure(program.results)


def _place(device: jax.Device) -> str:
    coordinates = f" at {tuple(device.coords)}" if hasattr(device, "coords") else ""
    return f"device {device.id} of process {device.process_index}{coordinates}"


def _spec(sharding: Any) -> str:
    return str(sharding.spec) if isinstance(sharding, jax.sharding.NamedSharding) else "one device"


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    return json.loads(json.dumps(value, default=str))


@functools.cache
def _source() -> str:
    """Tells copies of this package from each other: a change anywhere may change a program."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root).as_posix()}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def _flags() -> list[str]:
    """XLA's, but for those that change no program."""
    idle = ("--xla_force_host_platform_device_count", "--xla_dump")
    return [flag for flag in shlex.split(os.environ.get("XLA_FLAGS", "")) if not flag.startswith(idle)]


def cpu_features() -> list[str]:
    """Of this machine, where Linux says them."""
    with contextlib.suppress(OSError):
        match = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        return sorted(feature for feature in set(match[1].split()) if FEATURES.match(feature)) if match else []
    return [platform.processor()]
