"""From the name of a checkpoint to an engine that serves it."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import psutil
from jax.sharding import Mesh

from jaxinfer import distributed
from jaxinfer.checkpoint.files import eos_token_ids, read_config, read_generation_config
from jaxinfer.checkpoint.hub import resolve
from jaxinfer.checkpoint.load import FLOATS
from jaxinfer.checkpoint.open import Weights, load_weights, open_weights
from jaxinfer.checkpoint.orbax import Converted
from jaxinfer.checkpoint.settle import as_stored
from jaxinfer.compile_cache import enable_compile_cache
from jaxinfer.distributed import reported
from jaxinfer.engine.buckets import Buckets
from jaxinfer.engine.compiled import Folder, open_folder
from jaxinfer.engine.config import EngineConfig, check_options, in_our_words
from jaxinfer.engine.defaults import checkpoint_params
from jaxinfer.engine.engine import Engine
from jaxinfer.engine.follower import agree, follow
from jaxinfer.engine.kv_cache import KVCacheManager
from jaxinfer.engine.leader import Leader
from jaxinfer.engine.programs import Programs, cache_layout, placed_decode_state, placed_hidden, placed_params
from jaxinfer.engine.runner import Runner
from jaxinfer.engine.scheduler import Scheduler
from jaxinfer.engine.shards import DataParallelScheduler
from jaxinfer.engine.sizing import CPU_SHARE, RESERVE, Sizes, check_cache_memory, device_bytes, page_size, size_cache
from jaxinfer.errors import CheckpointError
from jaxinfer.kernels.cpu import multiplies
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.model import AbstractModel
from jaxinfer.models.registry import parse_config
from jaxinfer.quantization.stored import asked_for, check_stored
from jaxinfer.sampling.params import SamplingParams
from jaxinfer.sharding import ROWS, axis_size, compute_capability, describe, devices_of, local_devices, make_mesh
from jaxinfer.text.base import NoTokenizer, Tokenizer
from jaxinfer.text.tokenizer import LOOKED_FOR, check_vocabulary, has_tokenizer, load_tokenizer

log = logging.getLogger("jaxinfer")

MAX_STEPS = 32  # tokens a row that one decoding call may produce


@dataclass(frozen=True)
class Loaded:
    """An engine and what it was made from."""

    engine: Engine
    folder: Path
    dtype: np.dtype[Any]
    sizes: Sizes
    asked: dict[str, Any]  # of sampling, by the checkpoint
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
        weights = sum(a.size * a.dtype.itemsize for a in model.abstract.values())
        sizes = self.sizes
        return (
            f"weights {weights / 2**30:.2f} GiB in {model.precision}, KV cache {sizes.bytes / 2**30:.2f} GiB in "
            f"{self.engine.runner.programs.layout.dtype} for "
            f"{self.engine.runner.programs.cache_tokens} tokens, max_model_len {sizes.max_model_len}"
            + (f", {describe(mesh)}" if (mesh := self.engine.runner.programs.mesh) else "")
        )


@reported
def load_engine(model: str | os.PathLike[str], **options: Any) -> Loaded:
    """Loads a folder in Hugging Face's format, or a hub id. Options: see EngineConfig.

    Raises ValueError, FileNotFoundError and other OSErrors, each with one line: what is wrong, where, what to do.
    """
    start = time.perf_counter()
    given, options = check_options(options), dict(in_our_words(options))
    say = given["on_progress"] or (lambda _: None)
    folder = resolve(model, given["revision"], given["token"])
    enable_compile_cache()
    group = distributed.group()
    if group is not None and group.taken:
        raise ValueError("there was an LLM in this program already: on several hosts it can have one")
    devices = _devices()
    check_cache_memory(given["kv_cache_memory"], _memory())
    config = read_config(folder)
    if given["architecture"] is not None:
        check_architecture(given["architecture"], config, folder / "config.json")
    # The cheap files first: what is wrong with them shows before gigabytes are read.
    generation_config = read_generation_config(folder)
    shape = parse_config(config)[1]
    check_stored(config)
    tokenizer = _tokenizer(folder, given)
    check_vocabulary(tokenizer, shape.vocab_size)
    eos = _eos_token_ids(folder, generation_config, config, tokenizer.eos_token_id)
    asked = checkpoint_params(generation_config, config, folder, shape.vocab_size)
    compiled = None
    with open_weights(folder) as checkpoint:
        config = as_stored(config, checkpoint)
        given["quantization"] = options["quantization"] = asked_for(given["quantization"], config)
        if given["compiled"] is not None:
            compiled = open_folder(given["compiled"], config, devices, options, say)
            given.update(compiled.manifest.options if compiled else {})  # type: ignore[typeddict-item]
        if isinstance(checkpoint, Converted):
            checkpoint.check(given["quantization"])
        place = _place(shape, devices, given["mesh"])
        dtype = choose_dtype(given["dtype"], config, checkpoint, place)
        abstract = AbstractModel.from_config(config, computes_in(dtype, place), given["quantization"], dtype)
        # Refuses what can't be, before the weights are read.
        cache_layout(abstract, place, given["attention"], given["kv_cache_dtype"])
        if group is not None:
            agree(group, given, config, dtype, checkpoint, place, compiled)
        done = 0

        def on_tensor(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            say(f"loading weights {done / max(checkpoint.nbytes, 1):.0%}")

        params = load_weights(abstract, checkpoint, place, on_tensor)

    if compiled is not None and (problem := _misfit(compiled, abstract, place, given)):
        compiled.complain(problem)
        compiled, given["max_model_len"] = None, options.get("max_model_len")
    programs, sizes = sized_programs(abstract, place, given, _available(abstract, place, given), compiled)
    if given["max_model_len"] is None and sizes.max_model_len < shape.max_context:
        log.warning(
            "max_model_len is %d of the model's %d tokens: more does not fit in the KV cache",
            sizes.max_model_len,
            shape.max_context,
        )
    runner = Runner(programs, params, say, compiled)
    if group is not None:
        if not group.leads:
            follow(group, runner)
        runner.leader = Leader(group)
    engine = Engine(
        runner,
        make_scheduler(programs, given["enable_prefix_caching"]),
        tokenizer,
        eos_token_ids=eos,
        max_model_len=sizes.max_model_len,
        seed=given["seed"],
    )
    if given["warmup"]:
        runner.warm_up()
    loaded = Loaded(engine, folder, dtype, sizes, asked, time.perf_counter() - start)
    log.info("loaded %s in %.1f s: %s", folder, loaded.load_seconds, loaded.describe())
    log.info("attention: %s", programs.layout.in_words)
    return loaded


def _tokenizer(folder: Path, given: EngineConfig) -> Tokenizer:
    """The one that is asked for, the checkpoint's own, or a stand-in that says that there is none."""
    if given["skip_tokenizer_init"]:
        return NoTokenizer(folder, "skip_tokenizer_init loads none")
    if given["tokenizer"] is not None:
        return load_tokenizer(resolve(given["tokenizer"], token=given["token"], weights=False))
    if has_tokenizer(folder):
        return load_tokenizer(folder)
    log.warning("%s has no tokenizer (%s): it takes and gives token ids only", folder, LOOKED_FOR)
    return NoTokenizer(folder, f"{folder} has none")


def check_architecture(wanted: Mapping[str, Any], config: Mapping[str, Any], path: Path) -> None:
    """Whether `config`, the content of `path`, is of the same architecture, however it is spelt. Raises ValueError."""
    if wanted.get("model_type") != config.get("model_type"):
        raise _disagreement(path, "model_type", config.get("model_type"), wanted.get("model_type"))
    _, found = parse_config(config)
    try:
        _, expected = parse_config(wanted)
    except ValueError as error:
        raise ValueError(str(error).replace("config.json", "architecture", 1)) from None
    for field in dataclasses.fields(found):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        if one != other:
            raise _disagreement(path, field.name, one, other)


def _disagreement(path: Path, name: str, found: object, wanted: object) -> ValueError:
    return ValueError(
        f"{path}: {name} is {found!r:.200}, and the deployment's architecture says {wanted!r:.200}: give the model "
        "that is meant, or its architecture"
    )


@reported
def local_programs(config: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[Programs, Sizes]:
    """The programs of an engine with these options on this machine's devices, or those of all hosts together.
    config: a config.json's content.

    Raises what load_engine raises.
    """
    given = check_options(options)
    devices = _devices()
    check_cache_memory(given["kv_cache_memory"], _memory())
    place = _place(parse_config(config)[1], devices, given["mesh"])
    dtype = choose_dtype(given["dtype"], config, None, place)
    model = AbstractModel.from_config(config, computes_in(dtype, place), given["quantization"], dtype)
    weights = device_bytes(placed_params(model, place))
    return sized_programs(model, place, given, _available(model, place, given, weights=weights))


def _devices() -> list[jax.Device]:
    """Of this machine; where several hosts have one model, of all of them."""
    return local_devices() if distributed.group() is None else jax.devices()


def place_for(model: AbstractModel, mesh: str | None) -> jax.Device | Mesh:
    """What would hold the model here: see EngineConfig."""
    return _place(model.config, _devices(), mesh)


def _place(shape: ModelConfig, devices: Sequence[jax.Device], mesh: str | None) -> jax.Device | Mesh:
    """What holds the model: a mesh, or the first device."""
    alone = devices[0].process_index == devices[-1].process_index
    wanted = 1 if devices[0].platform == "cpu" and alone else len(devices)
    return make_mesh(mesh, devices, shape.num_heads, shape.num_kv_heads, shape.hidden_size, wanted) or devices[0]


def _misfit(compiled: Folder, model: AbstractModel, place: jax.Device | Mesh, given: EngineConfig) -> str | None:
    """What is wrong with the cache of programs that were compiled ahead."""
    sizes, attention = compiled.sizes, compiled.manifest.attention
    if sizes.bytes > (room := _available(model, place, given, RESERVE)):
        return f"their KV cache of {sizes.bytes:,} bytes does not fit in the {room:,} that are free"
    layout = cache_layout(model, place, given["attention"], given["kv_cache_dtype"])
    rows, tokens = limits(given, place)
    pages = sizes.num_pages, sizes.page_size, reach_of(tokens), sizes.max_model_len
    if (size := layout.nbytes(*pages, rows)) != sizes.bytes:
        return f"their KV cache is said to have {sizes.bytes:,} bytes, and has {size:,}"
    if layout.least(sizes.max_model_len, *pages[1:3], rows) > size:
        return f"their KV cache of {size:,} bytes is too small for a sequence of {sizes.max_model_len} tokens"
    if attention != layout.names:
        return f"what attends was {attention!r:.200} and is {layout.names!r}"
    return None


def make_scheduler(programs: Programs, prefix_caching: bool = True) -> DataParallelScheduler:
    """For calls of these programs."""

    groups = programs.layout.groups
    paged = [group for group in groups if group.pool is not None]

    def one() -> Scheduler:
        sizes = programs.page_counts, programs.page_size, programs.reach
        cache = KVCacheManager(paged, *sizes, prefix_caching, whole=len(paged) == len(groups))
        return Scheduler(cache, programs.max_rows, programs.max_tokens)

    return DataParallelScheduler([one() for _ in range(programs.shards)])


def sized_programs(
    model: AbstractModel, place: jax.Device | Mesh, given: EngineConfig, available: int, compiled: Folder | None = None
) -> tuple[Programs, Sizes]:
    """With a cache of the size that was compiled for, or of as many pages as there is room for in `available` bytes of
    each device. Raises ValueError if that is not enough."""
    max_rows, max_tokens = limits(given, place)
    if compiled is not None:
        sizes = compiled.sizes
    else:
        length = given["max_model_len"] or model.config.max_context
        sizes = size_cache(
            cache_layout(model, place, given["attention"], given["kv_cache_dtype"]),
            reach=reach_of(max_tokens),
            page_size=page_size(given["page_size"], place, max_rows, length),
            max_num_seqs=max_rows,
            max_model_len=given["max_model_len"],
            max_context=model.config.max_context,
            available=available,
        )
    programs = Programs(
        model,
        place,
        Buckets.make(max_rows, max_tokens),
        num_pages=sizes.num_pages,
        page_size=sizes.page_size,
        max_model_len=sizes.max_model_len,
        max_rows=max_rows,
        max_steps=MAX_STEPS,
        attention=given["attention"],
        kv_cache_dtype=given["kv_cache_dtype"],
    )
    return programs, sizes


def choose_dtype(
    wanted: str, config: Mapping[str, Any], checkpoint: Weights | None, place: jax.Device | Mesh
) -> np.dtype[Any]:
    """The dtype of weights: see EngineConfig. Without a checkpoint, what it stores is taken for bfloat16."""
    names = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
    if wanted != "auto":
        return np.dtype(names[wanted])
    said = str(config.get("dtype", config.get("torch_dtype"))).removeprefix("torch.")
    tensors = checkpoint.tensors.values() if checkpoint else ()
    unknown = np.dtype(np.float32 if checkpoint else ml_dtypes.bfloat16)
    stored = next((info.dtype for info in tensors if info.dtype in FLOATS), unknown)
    dtype = np.dtype(names[said]) if said in names else stored
    device = devices_of(place)[0]
    if device.platform == "cpu" and computes_in(dtype, place) == dtype:
        return np.dtype(np.float32)
    if (compute_capability(device) or 8.0) < 8.0 and dtype != np.float32:
        return np.dtype(np.float16)
    return dtype


def computes_in(dtype: np.dtype[Any], place: jax.Device | Mesh) -> np.dtype[Any]:
    """The dtype of activations and cache where weights have this one: the same, but float32 for bfloat16 where a kernel
    multiplies the two, which is as fast and more exact."""
    on_cpu = devices_of(place)[0].platform == "cpu"
    wide = on_cpu and dtype == ml_dtypes.bfloat16 and multiplies("float32", "bfloat16")
    return np.dtype(np.float32) if wide else dtype


def limits(given: EngineConfig, place: jax.Device | Mesh) -> tuple[int, int]:
    """Most sequences that run at once, and most tokens of a call, on each shard of rows."""
    shards, on_cpu = axis_size(place, ROWS), devices_of(place)[0].platform == "cpu"
    max_rows = given["max_num_seqs"] or (64 if on_cpu else 256)
    max_tokens = given["max_num_batched_tokens"] or max(512 if on_cpu else 2048, max_rows)
    if max_tokens < max_rows:
        raise ValueError(f"max_num_batched_tokens is {max_tokens}: it must be at least max_num_seqs, {max_rows}")
    return -(-max_rows // shards), -(-max_tokens // shards)


def reach_of(max_tokens: int) -> int:
    """Most tokens of one sequence that a call writes."""
    return max(max_tokens, MAX_STEPS)


def _available(
    model: AbstractModel, place: jax.Device | Mesh, given: EngineConfig, slack: float = 0.0, weights: int = 0
) -> int:
    """Bytes that the KV cache may take of each device, now that the weights are there, or `weights` bytes of them are
    to come; on the host with the least. slack: share of the memory that it may have beyond what is planned."""
    group, here = distributed.group(), _available_here(model, place, given, slack, weights)
    return here if group is None else int(min(group.gather(here)))


def _available_here(
    model: AbstractModel, place: jax.Device | Mesh, given: EngineConfig, slack: float, weights: int
) -> int:
    if given["kv_cache_memory"] is not None:
        return given["kv_cache_memory"]
    max_rows, max_tokens = limits(given, place)
    rest = device_bytes((placed_decode_state(model, place, max_rows), placed_hidden(model, place, max_tokens)))
    stats = _memory_stats()
    if stats is None:
        return max(0, int(_memory() * CPU_SHARE) - rest)
    share = given["memory_utilization"] - RESERVE + slack
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
    found = generation.get("eos_token_id") or eos_token_ids(config, folder / "config.json")
    return found or ([] if tokenizer_id is None else [tokenizer_id])
