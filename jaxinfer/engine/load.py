"""From the name of a checkpoint to an engine that serves it."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil
from jax.sharding import Mesh

from jaxinfer import distributed
from jaxinfer.checkpoint.files import eos_token_ids, read_generation_config
from jaxinfer.checkpoint.open import load_weights, open_weights
from jaxinfer.checkpoint.orbax import Converted
from jaxinfer.checkpoint.settle import as_stored
from jaxinfer.compile_cache import enable_compile_cache, executables_folder
from jaxinfer.distributed import reported
from jaxinfer.engine.adapters import AdapterSlots
from jaxinfer.engine.buckets import Buckets
from jaxinfer.engine.compiled import Folder, open_folder
from jaxinfer.engine.config import EngineConfig, check_options
from jaxinfer.engine.defaults import checkpoint_params
from jaxinfer.engine.dtypes import choose_dtype
from jaxinfer.engine.engine import Engine
from jaxinfer.engine.executables import open_declarations, open_executables
from jaxinfer.engine.follower import agree, follow
from jaxinfer.engine.kv_cache import KVCacheManager
from jaxinfer.engine.leader import Leader
from jaxinfer.engine.loading import (
    Opened,
    abstract_model,
    all_devices,
    check_architecture,
    choose_placement,
    open_adapters,
    read_tokenizer,
    settle_changes,
)
from jaxinfer.engine.programs import (
    MAX_STEPS,
    AdapterLimits,
    Programs,
    cache_layout,
    placed_adapters,
    placed_decode_state,
    placed_hidden,
    placed_params,
    reach,
)
from jaxinfer.engine.runner import Runner
from jaxinfer.engine.scheduler import Scheduler
from jaxinfer.engine.shards import DataParallelScheduler
from jaxinfer.engine.sizing import CPU_SHARE, RESERVE, Sizes, check_cache_memory, choose_sizes, device_bytes
from jaxinfer.errors import CheckpointError, UnsupportedError
from jaxinfer.models.declared import Declarations
from jaxinfer.models.model import AbstractModel
from jaxinfer.models.registry import parse_config
from jaxinfer.models.tasks import GENERATE
from jaxinfer.models.wrapped import with_text
from jaxinfer.quantization.stored import asked_for, check_stored
from jaxinfer.sampling.params import SamplingParams
from jaxinfer.sharding import ROWS, axis_size, describe, devices_of, local_devices
from jaxinfer.text.tokenizer import check_vocabulary

log = logging.getLogger("jaxinfer")


@dataclass(frozen=True)
class Loaded:
    """An engine and what it was made from.

    engine, sizes: ready for requests, and how much context it has room for.
    folder, dtype: the checkpoint's, and that of its weights here.
    asked: of sampling, by the checkpoint.
    load_seconds: that all of it took.
    """

    engine: Engine
    folder: Path
    dtype: np.dtype[Any]
    sizes: Sizes
    asked: dict[str, Any]
    load_seconds: float

    def default_sampling_params(self) -> SamplingParams:
        """What generation_config.json asks for; greedy unless it says `do_sample`. Raises ValueError."""
        try:
            return SamplingParams(**self.asked)
        except ValueError as error:
            path = self.folder / "generation_config.json"
            raise CheckpointError(f"{path}: {error}; or give sampling_params") from None

    def describe(self) -> str:
        """Weights and cache in one line."""
        model = self.engine.runner.model
        sizes = self.sizes
        return (
            f"weights {model.nbytes / 2**30:.2f} GiB in {model.precision}, KV cache {sizes.bytes / 2**30:.2f} GiB in "
            f"{self.engine.runner.programs.layout.dtype} for "
            f"{self.engine.runner.programs.cache_tokens} tokens, max_model_len {sizes.max_model_len}"
            + (f", {describe(mesh)}" if (mesh := self.engine.runner.programs.mesh) else "")
        )


@reported
def load_opened(opened: Opened) -> Loaded:
    """A model that generates. Raises ValueError, FileNotFoundError and other OSErrors, each with one line: what is
    wrong, where, what to do; and UnsupportedError for other models."""
    if opened.task != GENERATE:
        raise UnsupportedError(f"{opened.folder}: it is there to {opened.task} texts, which jaxinfer.LLM does")
    start, folder, settings, options, config = opened.start, opened.folder, opened.settings, opened.given, opened.config
    say = settings["on_progress"] or (lambda _: None)
    cache = executables_folder()
    group = distributed.group()
    if group is not None and group.taken:
        raise ValueError("there was an LLM in this program already: on several hosts it can have one")
    devices = all_devices()
    check_cache_memory(settings["kv_cache_memory"], _memory())
    # The cheap files first: what is wrong with them shows before gigabytes are read.
    generation_config = read_generation_config(folder)
    adapters = open_adapters(settings)
    declarations = Declarations() if cache is None or group is not None else open_declarations(cache)
    shape = declarations.config(config).config
    check_stored(config)
    tokenizer = read_tokenizer(folder, settings)
    check_vocabulary(tokenizer, shape.vocab_size)
    eos = _eos_token_ids(folder, generation_config, config, tokenizer.eos_token_id)
    asked = checkpoint_params(generation_config, with_text(config), folder, shape.vocab_size)
    compiled = None
    with open_weights(folder) as checkpoint:
        config = as_stored(config, checkpoint, declarations)
        if settings["architecture"] is not None:
            check_architecture(settings["architecture"], config, folder / "config.json")
        settings["quantization"] = options["quantization"] = asked_for(settings["quantization"], config)
        if settings["compiled"] is not None:
            compiled = open_folder(settings["compiled"], config, devices, options, say)
            settings.update(compiled.manifest.options if compiled else {})  # type: ignore[typeddict-item]
        if isinstance(checkpoint, Converted):
            checkpoint.check(settings["quantization"])
        placement = choose_placement(shape, devices, settings["mesh"])
        dtype = choose_dtype(settings["dtype"], config, checkpoint, placement)
        abstract = abstract_model(config, dtype, placement, settings, declarations)
        # Refuses what can't be, before the weights are read.
        cache_layout(abstract, placement, settings["attention"], settings["kv_cache_dtype"])
        if group is not None:
            agree(group, settings, config, dtype, checkpoint, placement, compiled)
        done = 0

        def on_array(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            say(f"loading weights {done / abstract.nbytes:.0%}")

        settle_changes(settings, adapters.values(), abstract)
        params = load_weights(abstract, checkpoint, placement, on_array)

    if compiled is not None and (problem := _misfit(compiled, abstract, placement, settings)):
        compiled.complain(problem)
        compiled, settings["max_model_len"] = None, options.get("max_model_len")
        abstract = abstract_model(config, dtype, placement, settings, declarations)
    if abstract.config.max_context > shape.max_context:
        log.warning(
            "max_model_len is %d, beyond the original context of %d tokens: sequences of any length are computed with "
            "the factors for long ones (longrope); leave it out for those for short ones",
            settings["max_model_len"],
            shape.max_context,
        )
    programs, sizes = sized_programs(abstract, placement, settings, _available(abstract, placement, settings), compiled)
    if options.get("enable_prefix_caching") and not programs.layout.paged and not sizes.snapshots:
        raise ValueError(
            "enable_prefix_caching is True: layers of this model keep a state of a sequence, and a KV cache of "
            f"{sizes.bytes:,} bytes has no room for copies: raise kv_cache_memory, or leave it out"
        )
    if settings["max_model_len"] is None and sizes.max_model_len < shape.max_context:
        log.warning(
            "max_model_len is %d of the model's %d tokens: more does not fit in the KV cache",
            sizes.max_model_len,
            shape.max_context,
        )
    kept = open_executables(cache, programs) if cache is not None and group is None and compiled is None else None
    if kept is None:
        enable_compile_cache()
    runner = Runner(programs, params, say, compiled, kept)
    if group is not None:
        if not group.leads:
            follow(group, runner)
        runner.leader = Leader(group)
    engine = Engine(
        runner,
        make_scheduler(programs, settings["enable_prefix_caching"]),
        tokenizer,
        eos_token_ids=eos,
        max_model_len=sizes.max_model_len,
        seed=settings["seed"],
        max_host_adapters=settings["max_host_adapters"],
    )
    for name, path in adapters.items():
        engine.load_adapter(name, path)
    if settings["warmup"]:
        runner.warm_up()
        with contextlib.suppress(UnsupportedError):
            engine.guides.prepare()
    loaded = Loaded(engine, folder, dtype, sizes, asked, time.perf_counter() - start)
    log.info("loaded %s in %.1f s: %s", folder, loaded.load_seconds, loaded.describe())
    log.info("attention: %s", programs.layout.in_words)
    return loaded


@reported
def local_programs(config: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[Programs, Sizes]:
    """The programs of an engine with these options on this machine's devices, or those of all hosts together.
    config: a config.json's content.

    Raises what load_opened raises.
    """
    settings = check_options(options)
    adapters = open_adapters(settings)
    devices = all_devices()
    check_cache_memory(settings["kv_cache_memory"], _memory())
    placement = choose_placement(parse_config(config)[1], devices, settings["mesh"])
    dtype = choose_dtype(settings["dtype"], config, None, placement)
    model = abstract_model(config, dtype, placement, settings)
    settle_changes(settings, adapters.values(), model)
    weights = device_bytes(placed_params(model, placement))
    return sized_programs(model, placement, settings, _available(model, placement, settings, weights=weights))


def placement_for(model: AbstractModel, mesh: str | None) -> jax.Device | Mesh:
    """What would hold the model here: see EngineConfig."""
    return choose_placement(model.config, all_devices(), mesh)


def _misfit(compiled: Folder, model: AbstractModel, placement: jax.Device | Mesh, settings: EngineConfig) -> str | None:
    """What is wrong with the cache of programs that were compiled ahead."""
    sizes, attention = compiled.sizes, compiled.manifest.attention
    if sizes.bytes > (room := _available(model, placement, settings, RESERVE)):
        return f"their KV cache of {sizes.bytes:,} bytes does not fit in the {room:,} that are free"
    layout = cache_layout(model, placement, settings["attention"], settings["kv_cache_dtype"])
    rows, tokens = limits(settings, placement)
    pages = sizes.num_pages, sizes.page_size, reach(tokens), sizes.max_model_len
    if (size := layout.nbytes(*pages, rows + sizes.snapshots)) != sizes.bytes:
        return f"their KV cache is said to have {sizes.bytes:,} bytes, and has {size:,}"
    if layout.least(sizes.max_model_len, *pages[1:3], rows) > size:
        return f"their KV cache of {size:,} bytes is too small for a sequence of {sizes.max_model_len} tokens"
    if attention != layout.names:
        return f"what attends was {attention!r:.200} and is {layout.names!r}"
    return None


def make_scheduler(programs: Programs, prefix_caching: bool = True) -> DataParallelScheduler:
    """For calls of these programs."""
    layout, rows = programs.layout, programs.max_rows
    paged = [group for group in layout.groups if group.pool is not None]
    adapters = AdapterSlots(programs.adapter_limits.slots)
    snapshots = None if layout.paged else range(rows, rows + programs.snapshots)

    def scheduler() -> Scheduler:
        sizes = programs.page_counts, programs.page_size, programs.reach
        cache = KVCacheManager(paged, *sizes, prefix_caching, snapshots)
        return Scheduler(cache, programs.max_rows, programs.max_tokens, adapters)

    return DataParallelScheduler([scheduler() for _ in range(programs.shards)])


def sized_programs(
    model: AbstractModel,
    placement: jax.Device | Mesh,
    settings: EngineConfig,
    available: int,
    compiled: Folder | None = None,
) -> tuple[Programs, Sizes]:
    """With a cache of the size that was compiled for, or of as many pages as there is room for in `available` bytes of
    each device. Raises ValueError if that is not enough."""
    max_rows, max_tokens = limits(settings, placement)
    if compiled is not None:
        sizes = compiled.sizes
    else:
        sizes = choose_sizes(
            cache_layout(model, placement, settings["attention"], settings["kv_cache_dtype"]),
            placement,
            settings["page_size"],
            reach=reach(max_tokens),
            max_num_seqs=max_rows,
            max_model_len=settings["max_model_len"],
            max_context=model.config.max_context,
            available=available,
            prefix_caching=settings["enable_prefix_caching"],
        )
    programs = Programs(
        model,
        placement,
        Buckets.make(max_rows, max_tokens, devices_of(placement)[0].platform),
        num_pages=sizes.num_pages,
        page_size=sizes.page_size,
        max_model_len=sizes.max_model_len,
        max_rows=max_rows,
        max_steps=MAX_STEPS,
        attention=settings["attention"],
        kv_cache_dtype=settings["kv_cache_dtype"],
        snapshots=sizes.snapshots,
        adapter_limits=AdapterLimits.of(settings),
    )
    return programs, sizes


def limits(settings: EngineConfig, placement: jax.Device | Mesh) -> tuple[int, int]:
    """Most sequences that run at once, and most tokens of a call, on each shard of rows."""
    shards, on_cpu = axis_size(placement, ROWS), devices_of(placement)[0].platform == "cpu"
    max_rows = settings["max_num_seqs"] or (64 if on_cpu else 256)
    max_tokens = settings["max_num_batched_tokens"] or max(512 if on_cpu else 2048, max_rows)
    if max_tokens < max_rows:
        raise ValueError(f"max_num_batched_tokens is {max_tokens}: it must be at least max_num_seqs, {max_rows}")
    return -(-max_rows // shards), -(-max_tokens // shards)


def _available(
    model: AbstractModel, placement: jax.Device | Mesh, settings: EngineConfig, slack: float = 0.0, weights: int = 0
) -> int:
    """Bytes that the KV cache may take of each device, now that the weights are there, or `weights` bytes of them are
    to come; on the host with the least. slack: share of the memory that it may have beyond what is planned."""
    group, here = distributed.group(), _available_here(model, placement, settings, slack, weights)
    return here if group is None else int(min(group.gather(here)))


def _available_here(
    model: AbstractModel, placement: jax.Device | Mesh, settings: EngineConfig, slack: float, weights: int
) -> int:
    if settings["kv_cache_memory"] is not None:
        return settings["kv_cache_memory"]
    max_rows, max_tokens = limits(settings, placement)
    state = placed_decode_state(model, placement, max_rows), placed_hidden(model, placement, max_tokens)
    slots = placed_adapters(model, placement, AdapterLimits.of(settings))
    rest = device_bytes((state, slots))
    stats = _memory_stats()
    if stats is None:
        return max(0, int(_memory() * CPU_SHARE) - rest)
    share = settings["memory_utilization"] - RESERVE + slack
    return max(0, int(stats["bytes_limit"] * share) - stats["bytes_in_use"] - weights - rest)


def _memory_stats() -> dict[str, int] | None:
    """Of an accelerator of this host, if it says them: those of others don't."""
    device = local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    return stats if stats and "bytes_limit" in stats else None


def _memory() -> int:
    """Bytes of a device's memory, or else of the machine's."""
    stats = _memory_stats()
    return int(psutil.virtual_memory().total if stats is None else stats["bytes_limit"])


def _eos_token_ids(
    folder: Path, generation: Mapping[str, Any], config: Mapping[str, Any], tokenizer_id: int | None
) -> list[int]:
    """All EOS ids of generation_config.json; else those of config.json; else the tokenizer's."""
    ids = generation.get("eos_token_id") or eos_token_ids(with_text(config), folder / "config.json")
    return ids or ([] if tokenizer_id is None else [tokenizer_id])
