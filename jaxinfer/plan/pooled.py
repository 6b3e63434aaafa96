"""Models that make vectors or classes, on slices that are not there: what they hold, and how many texts/s at best.

The bound is roofline.py's, of calls that are full of texts of one length.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxinfer.compile_cache import without_compile_cache
from jaxinfer.engine.background import in_background
from jaxinfer.engine.config import EngineConfig, check_options
from jaxinfer.engine.loading import Opened, choose_placement, open_model
from jaxinfer.engine.pooling.load import pooling_programs, task_config, vectors_of
from jaxinfer.engine.pooling.programs import Pooler, PoolingPrograms, PoolTexts
from jaxinfer.engine.sizing import device_bytes
from jaxinfer.errors import CheckpointError
from jaxinfer.models.model import AbstractModel
from jaxinfer.models.tasks import wanted_task
from jaxinfer.plan.compile import compiled_program
from jaxinfer.plan.fit import DoesNotFit, model_of
from jaxinfer.plan.roofline import Bound
from jaxinfer.plan.slices import GIB, Slice
from jaxinfer.plan.sweep import meshes
from jaxinfer.plan.targets import find_target
from jaxinfer.sharding import FSDP, TENSOR, axis_size, describe

LENGTHS = (16, 64, 256, 1024, 4096)  # of texts, where nobody says which


@dataclass(frozen=True)
class PooledFit:
    """A model on a slice.

    target: the slice.
    programs: an engine's there.
    weights: their bytes, on each chip.
    """

    target: Slice
    programs: PoolingPrograms
    weights: int

    @property
    def mesh(self) -> str:
        """As a spec."""
        return "tensor=1" if self.programs.mesh is None else describe(self.programs.mesh)

    @property
    def devices(self) -> int:
        """That are used."""
        return axis_size(self.programs.mesh, TENSOR) * self.programs.shards

    def bound(self, length: int) -> dict[str, Any]:
        """Of a full call of texts of so many tokens, or of a single longer one on each shard."""
        shards, mesh = self.programs.shards, self.programs.mesh
        texts = max(self.programs.budget // length, 1)
        sizes = axis_size(mesh, TENSOR), axis_size(mesh, (FSDP,))
        step = pooled_bound(self.programs.model, self.target.chip, *sizes, texts * length, length)
        rate = texts * shards / step.seconds
        return {
            "tokens": length,
            "texts": texts * shards,
            "seconds": step.seconds,
            "binds": step.binds,
            "texts_per_second": rate,
            "texts_per_second_per_chip": rate * self.target.per_chip / self.devices,
            "flops": step.flops,
            "bytes_moved": step.moved,
            "bytes_sent": step.sent,
        }


def opened_for(model: str | os.PathLike[str], config: Mapping[str, Any], options: EngineConfig) -> Opened:
    """A model's folder, or a config.json's content (see `with_task`) where there is none."""
    path = Path(model).expanduser()
    folder = path.parent if path.name == "config.json" else path
    if folder.is_dir():
        return open_model(folder, **options)
    return Opened(folder, dict(config), wanted_task(config), None, None, check_options(options), dict(options), 0.0)


def model_for(opened: Opened, target: Slice) -> AbstractModel:
    """See `model_of`."""
    settings, config = opened.settings, task_config(opened)
    return model_of(config, settings["dtype"], target, settings["quantization"], settings["max_model_len"])


def fit_pooled(opened: Opened, target: Slice, model: AbstractModel | None = None) -> PooledFit:
    """What an LLM holds there. model: `model_for` it. Raises DoesNotFit, with what would fit."""
    settings = opened.settings
    model = model_for(opened, target) if model is None else model
    shape = model.config
    placement = choose_placement(shape, target.devices, settings["mesh"])
    try:
        sentence, pooler, *_ = vectors_of(opened, shape)
    except CheckpointError:  # nothing says how, and the mean costs what others do
        sentence, pooler = None, Pooler(("mean",))
    programs = pooling_programs(model, placement, opened, sentence, pooler)
    held = PooledFit(target, programs, device_bytes(programs.params))
    if held.weights > target.chip.memory:
        raise DoesNotFit(
            f"{target.name}: weights take {held.weights / GIB:.2f} GiB of a chip's {target.chip.memory / GIB:.2f}: "
            "take more chips, or quantization int8"
        )
    return held


def pooled_figures(opened: Opened, target: Slice, length: int | None) -> dict[str, Any]:
    """A plan as numbers by name. Bytes are each device's. length: tokens of each text; None: several. Raises
    DoesNotFit, and ValueError for texts that are too long."""
    held = fit_pooled(opened, target)
    programs = held.programs
    lengths = _lengths(programs, length)
    keys = [(PoolTexts.kind, programs.sizes[-1])] if target.compiles else []
    with without_compile_cache(), in_background(lambda key: compiled_program(programs, key), keys) as futures:
        compiled = [future.result() for future in futures]
    sizes = {"weights": held.weights}
    for program in compiled:
        sizes |= {"padding": program.padding, "temporaries": program.temporaries, "code": program.code}
    total = sum(sizes.values())
    sizes |= {"total": total, "memory": target.chip.memory, "free": target.chip.memory - total}
    if sizes["free"] < 0:
        raise DoesNotFit(
            f"{target.name}: programs need {total / GIB:.2f} GiB, and a chip has {target.chip.memory / GIB:.2f}: lower "
            "max_num_batched_tokens or max_model_len, or take more chips"
        )
    return {
        "topology": target.name,
        "mesh": held.mesh,
        "devices": held.devices,
        "devices_per_chip": target.per_chip,
        "compiled": bool(compiled),
        "task": opened.task,
        "dtype": str(programs.model.dtype),
        "quantization": programs.model.quantization,
        "precision": programs.model.precision,
        "max_model_len": programs.max_model_len,
        "max_num_batched_tokens": programs.budget * programs.shards,
        "bytes": sizes,
        "programs": [program.figures() for program in compiled],
        "texts": [held.bound(own) for own in lengths],
    }


def pooled_sweep(opened: Opened, topologies: list[str], length: int | None) -> tuple[list[dict[str, Any]], int]:
    """Every slice and every mesh on it that the model fits, from shapes, most texts/s a chip first; and how many it
    does not."""
    found, refused = [], 0
    models: dict[str, AbstractModel] = {}  # by kinds of chips
    for name in topologies:
        target = find_target(name, compiles=False)
        if target.chip.name not in models:
            models[target.chip.name] = model_for(opened, target)
        model = models[target.chip.name]
        for mesh in meshes(model, target):
            settings: EngineConfig = {**opened.settings, "mesh": mesh}
            try:
                held = fit_pooled(dataclasses.replace(opened, settings=settings), target, model)
            except DoesNotFit:
                refused += 1
                continue
            own = _lengths(held.programs, length)
            found.append({"topology": name, "mesh": mesh} | held.bound(own[-1] if length else own[len(own) // 2]))
    return sorted(found, key=lambda entry: -entry["texts_per_second_per_chip"]), refused


def _lengths(programs: PoolingPrograms, length: int | None) -> list[int]:
    most = programs.max_model_len
    if length is not None and length > most:
        raise ValueError(f"context is {length}: a text of this model has at most {most} tokens")
    return [length] if length is not None else [*(own for own in LENGTHS if own < most), most]


def pooled_bound(model: AbstractModel, chip: Any, tensor: int, fsdp: int, tokens: int, length: int) -> Bound:
    """The bound of a call of `tokens` tokens in texts of `length`, on `tensor` chips; fsdp: as for `bound`.

    Tables are looked up, and not multiplied; layers that run several times are read once.
    """
    config = model.config
    described = json.loads(model.declared.described)
    order = list(described.get("order") or range(config.num_layers))
    body = sum(
        math.prod(spec.shape) * _runs(spec.name, order) for spec in model.params.values() if spec.is_embedding is False
    )
    products = {spec.name for spec in model.params.values() if spec.is_embedding is False}
    held = sum(
        math.prod(array.shape) * array.dtype.itemsize
        for name, array in model.abstract.items()
        if model.arrays[name][0].name in products
    )
    windows = described.get("windows") or (None,) * config.num_layers
    seen = sum(_seen(length, windows[i], config.causal) for i in order)
    attention = 2 * seen * config.num_heads * config.head_dim * tokens
    flops = 2 * (body * tokens + attention) / tensor
    stream = tokens * config.hidden_size * model.dtype.itemsize
    sent = (2 * config.num_layers + 1) * 2 * stream * (tensor - 1) / tensor + held / tensor * (fsdp - 1) / fsdp
    return Bound(tokens, chip, flops, held / tensor, sent)


def _runs(name: str, order: list[int]) -> int:
    """How often a weight is multiplied."""
    layer = re.match(r"(?:.*\.)?layers\.(\d+)\.", name)
    return 1 if layer is None else order.count(int(layer[1]))


def _seen(length: int, window: int | None, causal: bool) -> float:
    """Keys that a token sees, on the average of a text."""
    window = min(length, window or length)
    before = window - window * (window - 1) / 2 / length  # itself counted
    return before if causal else 2 * before - 1
