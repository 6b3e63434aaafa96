"""What this machine has, and what of it is used: what a report of a problem should begin with."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import psutil

from jaxinfer.attention import LayerLayout, reasons
from jaxinfer.cache import FullAttentionSpec
from jaxinfer.compile_cache import cache_folder
from jaxinfer.engine.load import local_programs
from jaxinfer.engine.loading import Opened
from jaxinfer.engine.pooling.load import local_pooling_programs
from jaxinfer.engine.serialized import cpu_features
from jaxinfer.kernels.cpu import ATTEND_ROWS, LEVELS, kernels
from jaxinfer.sharding import local_devices

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def examine() -> dict[str, str | list[str]]:
    """Facts by name, each a line, or several. Starts JAX, as `LLM` would; where that fails, devices are one line that
    says why."""
    memory = psutil.virtual_memory()
    devices: list[jax.Device] | str
    try:
        devices = local_devices()
    except ValueError as error:
        devices = str(error)
    device = None if isinstance(devices, str) else devices[0]
    attention, backends = _attention(device) if device else ("nothing: there is no device", [])
    return {
        "jaxinfer": f"{version('jaxinfer')}, Python {platform.python_version()} on {platform.platform()}",
        "versions": [f"{name} {_version(name)}" for name in ("jax", "jaxlib", "libtpu", "flax", "tokamax")],
        "devices": devices if isinstance(devices, str) else [_described(device) for device in devices],
        "attention": attention,
        "attention backends": backends,
        "CPU kernels": _kernels(device),
        "CPU features": " ".join(cpu_features()),
        "CPU cores": f"{_cores()} usable of {os.cpu_count()}",
        "huge pages": _huge_pages(),
        "memory": f"{memory.available / 2**30:.1f} GiB available of {memory.total / 2**30:.1f} GiB",
        "compilation cache": _cache(),
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "is not installed"


def _described(device: jax.Device) -> str:
    stats = device.memory_stats() if device.platform != "cpu" else None
    memory = f", {stats['bytes_limit'] / 2**30:.1f} GiB" if stats and "bytes_limit" in stats else ""
    return f"{device.platform}:{device.id} {device.device_kind}{memory}"


def _attention(device: jax.Device) -> tuple[str, list[str]]:
    """What attends for a model of the usual shape, and of each backend whether that is it, or why not."""
    layer = LayerLayout.of(FullAttentionSpec(8, 128), "float32" if device.platform == "cpu" else "bfloat16", device)
    assert layer.case is not None
    return layer.in_words, [f"{backend.name}: {why or 'used'}" for backend, why in reasons(layer.case)]


def examine_model(config: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, str | list[str]]:
    """Of a model, by the content of its config.json and options of `LLM`: what it would be here. Raises ValueError."""
    programs, sizes = local_programs(config, options)
    return {
        "the model's precision": programs.model.precision,
        "the model's attention": programs.layout.in_words,
        "the model's context": f"{sizes.max_model_len} tokens, and a cache of {programs.cache_tokens}",
    }


def examine_pooling(opened: Opened) -> dict[str, str | list[str]]:
    """The same of one that makes vectors or classes. Raises ValueError."""
    programs = local_pooling_programs(opened)
    kernel = ATTEND_ROWS in programs[programs.keys()[0]].lower().as_text()
    return {
        "the model's precision": programs.model.precision,
        "the model's attention": "a CPU kernel" if kernel else "plain XLA",
        "the model's context": f"texts of {programs.max_model_len} tokens, {programs.budget} on each device at a time",
    }


def _kernels(device: jax.Device | None) -> str:
    library = kernels()
    if library.level is None:
        return f"none, XLA computes everything: {library.why}"
    used = "" if device and device.platform == "cpu" else f"; not used on {device.platform}" if device else "; not used"
    better = LEVELS[LEVELS.index(library.level) + 1 :]
    lacking = f"; this CPU or the variable leaves out {', '.join(better)}" if better else ""
    return f"{library.level}: {library.why}{lacking}{used}"


def _huge_pages() -> str:
    try:
        match = re.search(r"\[(\w+)\]", HUGE_PAGES.read_text())
    except OSError:
        return "none that this system lets programs ask for"
    if match is None or match[1] == "never":
        return f"off, and decoding on CPU is slower without: as root, echo madvise > {HUGE_PAGES}"
    return f"on ({match[1]})"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cache() -> str:
    try:
        folder = cache_folder()
    except ValueError as error:
        return str(error)
    if folder is None:
        return "off"
    sizes = [file.stat().st_size for file in Path(folder).rglob("*") if file.is_file()]
    return f"{folder}: {len(sizes)} files, {sum(sizes) / 2**20:.0f} MiB"
