"""The engine's two largest programs, compiled for a slice: what they need of each chip's memory."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Unpack, get_args

import numpy as np

from jaxinfer.cache import cache_bytes_per_token
from jaxinfer.compile_cache import without_compile_cache
from jaxinfer.engine.buckets import Buckets
from jaxinfer.engine.load import MAX_STEPS
from jaxinfer.engine.options import DType, LoadOptions, check_options
from jaxinfer.engine.programs import Key, Programs
from jaxinfer.engine.sizing import RESERVE, Sizes, device_bytes, size_cache
from jaxinfer.models.model import Model
from jaxinfer.plan.slices import Slice
from jaxinfer.sampling.slots import Slots
from jaxinfer.sharding import kv_parts, make_mesh, tensor_sizes

GIB = 2**30


class DoesNotFit(ValueError):
    """Weights and a cache for the longest sequence are more than a chip has."""


@dataclass(frozen=True)
class Program:
    """A compiled program. Bytes are each chip's; reductions: how many, and the bytes that each chip gives to them."""

    key: Key
    temporaries: int
    code: int
    reductions: int
    reduced_bytes: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """A model on a slice. Bytes are each chip's."""

    model: Model
    slice: Slice
    tensor: int
    sizes: Sizes
    max_num_seqs: int
    max_num_batched_tokens: int
    weights: int
    slots: int
    programs: tuple[Program, ...]

    @property
    def temporaries(self) -> int:
        return max(program.temporaries for program in self.programs)

    @property
    def code(self) -> int:
        """Of the compiled programs; a warmed-up engine has more of them."""
        return sum(program.code for program in self.programs)

    @property
    def total(self) -> int:
        return self.weights + self.slots + self.sizes.bytes + self.temporaries + self.code

    @property
    def free(self) -> int:
        return self.slice.chip.memory - self.total


@dataclass(frozen=True)
class Fitted:
    """The programs of a model on a slice, and what they leave of each chip's memory. Bytes are each chip's."""

    programs: Programs
    sizes: Sizes
    tensor: int
    weights: int
    slots: int


def make_plan(config: Mapping[str, Any], place: Slice, **options: Unpack[LoadOptions]) -> Plan:
    """Compiles for a slice the largest programs that an LLM with these options would run there. See `fit`."""
    fitted = fit(config, place, **options)
    programs = fitted.programs
    max_num_seqs, max_num_batched_tokens = programs.max_rows, programs.buckets.tokens[-1]
    keys = [("decode", max_num_seqs, max_num_seqs), ("step", max_num_batched_tokens, max_num_seqs)]
    with without_compile_cache(), ThreadPoolExecutor(len(keys)) as pool:
        compiled = tuple(pool.map(lambda key: _compiled(programs, key), keys))
    return Plan(
        programs.model,
        place,
        fitted.tensor,
        fitted.sizes,
        max_num_seqs,
        max_num_batched_tokens,
        fitted.weights,
        fitted.slots,
        compiled,
    )


def fit(config: Mapping[str, Any], place: Slice, **options: Unpack[LoadOptions]) -> Fitted:
    """What an LLM with these options would run on a slice. config: a config.json's content.

    dtype "auto" is what that says, else bfloat16. Raises DoesNotFit, with what would fit.
    """
    given = check_options(options)
    max_num_seqs = given["max_num_seqs"] or 256
    max_num_batched_tokens = given["max_num_batched_tokens"] or max(2048, max_num_seqs)
    if max_num_batched_tokens < max_num_seqs:
        raise ValueError(f"max_num_batched_tokens is {max_num_batched_tokens}: less than max_num_seqs, {max_num_seqs}")
    max_model_len, page_size = given["max_model_len"], given["page_size"]
    dtype = _dtype(given["dtype"], config)
    model = Model.from_config(config, dtype)
    shape = model.config
    heads = shape.num_heads, shape.num_kv_heads
    grid = make_mesh(given["mesh"], place.devices, *heads, len(place.devices))
    tensor = grid.size if grid is not None else 1
    usable = int(place.chip.memory * (given["memory_utilization"] - RESERVE))
    slots = device_bytes(Slots.shapes(max_num_seqs, shape.vocab_size))
    # The pages' number is not known yet, and the weights' bytes don't depend on it.
    buckets = Buckets.make(max_num_seqs, max_num_batched_tokens)
    shapes: dict[str, Any] = {"page_size": page_size, "max_rows": max_num_seqs, "max_steps": MAX_STEPS}
    where = grid or place.devices[0]
    weights = device_bytes(Programs(model, where, buckets, num_pages=2, max_model_len=page_size, **shapes).params)
    per_token = cache_bytes_per_token(
        shape.num_layers, shape.num_kv_heads // kv_parts(tensor, shape.num_kv_heads), shape.head_dim, dtype
    )
    available = usable - weights - slots
    try:
        sizes = size_cache(
            bytes_per_token=per_token,
            page_size=page_size,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            max_context=shape.max_context,
            available=min(given["kv_cache_memory"] or available, max(available, 0)),
        )
    except ValueError:
        length = max_model_len or page_size
        needed = weights + slots + per_token * (length + 2 * page_size)
        remedies = [f"tensor={n}" for n in tensor_sizes(*heads, 256) if n > tensor and needed * tensor / n < usable][:1]
        if (room := available // (per_token * page_size) - 2) > 0:
            remedies.append(f"max_model_len at most {room * page_size}")
        raise DoesNotFit(
            f"{place.name}: needs {needed / GIB:.2f} GiB of the {usable / GIB:.2f} that a chip has for weights and "
            f"cache: {' or '.join(remedies) or 'no larger tensor divides the heads'}"
        ) from None
    programs = Programs(model, where, buckets, num_pages=sizes.num_pages, max_model_len=sizes.max_model_len, **shapes)
    return Fitted(programs, sizes, tensor, weights, slots)


def _dtype(wanted: str, config: Mapping[str, Any]) -> str:
    said = str(config.get("dtype", config.get("torch_dtype"))).removeprefix("torch.")
    return wanted if wanted != "auto" else said if said in get_args(DType) else "bfloat16"


def _compiled(programs: Programs, key: Key) -> Program:
    start = time.perf_counter()
    compiled = programs.lower(key).compile()
    seconds = time.perf_counter() - start
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None
    assert text is not None
    reduced = [_shape_bytes(found[1]) for found in re.finditer(r"= (\S+) all-reduce(?:-start)?\(", text)]
    return Program(
        key, memory.temp_size_in_bytes, memory.generated_code_size_in_bytes, len(reduced), sum(reduced), seconds
    )


def _shape_bytes(text: str) -> int:
    """Of "bf16[64,4096]{1,0}", or of a tuple of such."""
    sizes = {"bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "pred": 1}
    return sum(
        sizes.get(kind, 4) * int(np.prod([int(n) for n in shape.split(",") if n]))
        for kind, shape in re.findall(r"(\w+)\[([\d,]*)\]", text)
    )
