"""From the name of a checkpoint to an engine that serves it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

import jax
import ml_dtypes
import numpy as np
import psutil

from jaxinfer.cache import cache_bytes_per_token
from jaxinfer.checkpoint.files import eos_token_ids, read_config, read_generation_config
from jaxinfer.checkpoint.folder import Checkpoint
from jaxinfer.checkpoint.hub import resolve
from jaxinfer.checkpoint.load import FLOATS, load_params
from jaxinfer.compile_cache import enable_compile_cache
from jaxinfer.engine.buckets import Buckets
from jaxinfer.engine.engine import Engine
from jaxinfer.engine.pages import PageAllocator
from jaxinfer.engine.programs import Programs
from jaxinfer.engine.runner import Runner
from jaxinfer.engine.scheduler import Scheduler
from jaxinfer.engine.sizing import CPU_SHARE, RESERVE, Sizes, size_cache
from jaxinfer.models.model import Model
from jaxinfer.models.registry import REGISTRY
from jaxinfer.sampling.params import SamplingParams
from jaxinfer.sampling.slots import Slots
from jaxinfer.sharding import KV, describe, make_mesh
from jaxinfer.text.tokenizer import check_vocabulary, load_tokenizer

log = logging.getLogger("jaxinfer")

DType = Literal["auto", "float32", "bfloat16", "float16"]
MAX_STEPS = 32  # tokens a row that one decoding call may produce


class LoadOptions(TypedDict, total=False):
    """What `LLM` and `AsyncEngine` take besides the model.

    dtype: of weights, activations and cache. "auto" is what the checkpoint says on TPU and GPU (float16 on GPUs
        without bfloat16), float32 on CPU, where XLA multiplies 16-bit weights ten times slower.
    max_model_len: most tokens of prompt and output together. None: what config.json says, or what fits.
    seed: of requests that have no seed of their own.
    revision, token: of a hub id, as huggingface_hub has them.
    max_num_seqs: most sequences that run at once (256; 64 on CPU). max_num_batched_tokens: most tokens of one device
        call (2,048; 512 on CPU): longer prompts go in chunks. page_size: tokens a page of the cache.
    memory_utilization: share of an accelerator's memory for weights, cache and all else (0.9). On CPU the cache takes
        at most 10% of the machine's memory.
    kv_cache_memory: bytes of the KV cache. None: what `max_num_seqs` sequences need, as far as there is room.
    enable_prefix_caching: sequences with the same beginning share its pages (on).
    warmup: compile every program that can be needed now, so that nothing compiles later (off).
    on_progress: told, in a few words, what is being waited for.
    mesh: how many devices share the model, "tensor=4". None: on TPU and GPU as many of this host's as the model's heads
        allow, on CPU one.
    """

    dtype: DType
    max_model_len: int | None
    seed: int
    revision: str | None
    token: str | bool | None
    max_num_seqs: int | None
    max_num_batched_tokens: int | None
    page_size: int
    memory_utilization: float
    kv_cache_memory: int | None
    enable_prefix_caching: bool
    warmup: bool
    on_progress: Callable[[str], None] | None
    mesh: str | None


@dataclass(frozen=True)
class Loaded:
    """An engine and what it was made from."""

    engine: Engine
    folder: Path
    dtype: np.dtype[Any]
    sizes: Sizes
    generation_config: dict[str, Any]
    load_seconds: float

    def default_sampling_params(self) -> SamplingParams:
        """What generation_config.json asks for; greedy unless it says `do_sample`. Raises ValueError."""
        given = self.generation_config
        filters = ("temperature", "top_p", "top_k", "min_p") if given.get("do_sample") else ()
        chosen: dict[str, Any] = {} if filters else {"temperature": 0.0}
        chosen |= {n: given[n] for n in (*filters, "repetition_penalty") if given.get(n) is not None}
        try:
            return SamplingParams(**chosen)
        except ValueError as error:
            raise ValueError(f"{self.folder / 'generation_config.json'}: {error}; or give sampling_params") from None

    def describe(self) -> str:
        """Weights and cache in one line."""
        weights = sum(a.size * a.dtype.itemsize for a in self.engine.runner.model.abstract.values())
        sizes = self.sizes
        return (
            f"weights {weights / 2**30:.2f} GiB in {self.dtype}, KV cache {sizes.bytes / 2**30:.2f} GiB for "
            f"{(sizes.num_pages - 1) * sizes.page_size} tokens, max_model_len {sizes.max_model_len}"
            + (f", {describe(mesh)}" if (mesh := self.engine.runner.programs.mesh) else "")
        )


def load_engine(model: str | os.PathLike[str], **options: Any) -> Loaded:
    """Loads a folder in Hugging Face's format, or a hub id. Options: see LoadOptions.

    Raises ValueError, FileNotFoundError and other OSErrors, each with one line: what is wrong, where, what to do.
    """
    given = _checked(options)
    start = time.perf_counter()
    say = given["on_progress"] or (lambda _: None)
    folder = resolve(model, given["revision"], given["token"])
    enable_compile_cache()
    devices = jax.local_devices()
    device = devices[0]
    config = read_config(folder, REGISTRY)
    # The cheap files first: what is wrong with them shows before gigabytes are read.
    generation_config = read_generation_config(folder)
    shape = Model.from_config(config, "float32").config
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, shape.vocab_size)
    eos = _eos_token_ids(folder, generation_config, config, tokenizer.eos_token_id)
    with Checkpoint(folder) as checkpoint:
        dtype = _dtype(given["dtype"], config, checkpoint, device)
        abstract = Model.from_config(config, dtype)
        mesh = make_mesh(
            given["mesh"],
            devices,
            shape.num_heads,
            shape.num_kv_heads,
            1 if device.platform == "cpu" else len(devices),
        )
        done = 0

        def on_tensor(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            say(f"loading weights {done / max(checkpoint.nbytes, 1):.0%}")

        params = load_params(abstract, checkpoint, mesh or device, on_tensor)

    on_cpu = device.platform == "cpu"
    max_rows = given["max_num_seqs"] or (64 if on_cpu else 256)
    max_tokens = given["max_num_batched_tokens"] or max(512 if on_cpu else 2048, max_rows)
    page_size, max_model_len = given["page_size"], given["max_model_len"]
    available = given["kv_cache_memory"]
    if available is None:
        slots = sum(
            np.prod(s.shape) * s.dtype.itemsize for s in jax.tree.leaves(Slots.shapes(max_rows, shape.vocab_size))
        )
        available = _available(device, given["memory_utilization"], int(slots))
    kv_heads = shape.num_kv_heads // (mesh.shape[KV] if mesh else 1)  # of each device
    sizes = size_cache(
        bytes_per_token=cache_bytes_per_token(shape.num_layers, kv_heads, shape.head_dim, dtype),
        page_size=page_size,
        max_num_seqs=max_rows,
        max_model_len=max_model_len,
        max_context=shape.max_context,
        available=available,
    )
    if max_model_len is None and sizes.max_model_len < shape.max_context:
        log.warning(
            "max_model_len is %d of the model's %d tokens: more does not fit in the KV cache",
            sizes.max_model_len,
            shape.max_context,
        )
    buckets = Buckets.make(max_rows, max_tokens)
    pages = PageAllocator(sizes.num_pages, page_size, given["enable_prefix_caching"])
    programs = Programs(
        abstract,
        mesh or device,
        buckets,
        num_pages=sizes.num_pages,
        page_size=page_size,
        max_model_len=sizes.max_model_len,
        max_rows=max_rows,
        max_steps=MAX_STEPS,
    )
    runner = Runner(programs, params, say)
    engine = Engine(
        runner,
        Scheduler(pages, max_rows, max_tokens),
        tokenizer,
        eos_token_ids=eos,
        max_model_len=sizes.max_model_len,
        seed=given["seed"],
    )
    if given["warmup"]:
        runner.warm_up()
    loaded = Loaded(engine, folder, dtype, sizes, generation_config, time.perf_counter() - start)
    log.info("loaded %s in %.1f s: %s", folder, loaded.load_seconds, loaded.describe())
    return loaded


def _checked(options: dict[str, Any]) -> LoadOptions:
    given: LoadOptions = {
        "dtype": "auto",
        "max_model_len": None,
        "seed": 0,
        "revision": None,
        "token": None,
        "max_num_seqs": None,
        "max_num_batched_tokens": None,
        "page_size": 16,
        "memory_utilization": 0.9,
        "kv_cache_memory": None,
        "enable_prefix_caching": True,
        "warmup": False,
        "on_progress": None,
        "mesh": None,
    }
    unknown = sorted(set(options) - set(given))
    if unknown:
        raise ValueError(f"option {unknown[0]!r} is not known; there are {', '.join(given)}")
    given.update(options)  # type: ignore[typeddict-item]
    if given["dtype"] not in get_args(DType):
        raise ValueError(f"dtype is {given['dtype']!r}: it must be one of {', '.join(get_args(DType))}")
    _check_integer("seed", given["seed"], 0, 2**31 - 1)
    _check_integer("max_model_len", given["max_model_len"], 2)
    _check_integer("max_num_seqs", given["max_num_seqs"], 1, 4096)
    _check_integer("max_num_batched_tokens", given["max_num_batched_tokens"], 1, 2**20)
    _check_integer("page_size", given["page_size"], 1, 2**20)
    _check_integer("kv_cache_memory", given["kv_cache_memory"], 1)
    share = given["memory_utilization"]
    if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share <= 1:
        raise ValueError(f"memory_utilization is {share!r}: it must be a number above 0 and at most 1")
    return given


def _check_integer(name: str, value: int | None, low: int, high: int = 2**63) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high):
        raise ValueError(f"{name} is {value!r}: it must be an integer from {low} to {high}")


def _dtype(wanted: str, config: Mapping[str, Any], checkpoint: Checkpoint, device: jax.Device) -> np.dtype[Any]:
    """The dtype to compute in: see LoadOptions."""
    names = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
    if wanted != "auto":
        return np.dtype(names[wanted])
    if device.platform == "cpu":
        return np.dtype(np.float32)
    said = str(config.get("dtype", config.get("torch_dtype"))).removeprefix("torch.")
    stored = next((info.dtype for info in checkpoint.tensors.values() if info.dtype in FLOATS), np.dtype(np.float32))
    dtype = np.dtype(names[said]) if said in names else stored
    capability = getattr(device, "compute_capability", None)
    if device.platform == "gpu" and capability is not None and float(capability) < 8.0 and dtype != np.float32:
        return np.dtype(np.float16)
    return dtype


def _available(device: jax.Device, memory_utilization: float, slots: int) -> int:
    """Bytes that the KV cache may take on this device, now that the weights are there, beside the slots."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if not stats or "bytes_limit" not in stats:
        return max(0, int(psutil.virtual_memory().total * CPU_SHARE) - slots)
    return max(0, int(stats["bytes_limit"] * (memory_utilization - RESERVE)) - stats["bytes_in_use"] - slots)


def _eos_token_ids(
    folder: Path, generation: Mapping[str, Any], config: Mapping[str, Any], tokenizer_id: int | None
) -> list[int]:
    """All EOS ids of generation_config.json; else those of config.json; else the tokenizer's."""
    found = generation.get("eos_token_id") or eos_token_ids(config, folder / "config.json")
    return found or ([] if tokenizer_id is None else [tokenizer_id])
