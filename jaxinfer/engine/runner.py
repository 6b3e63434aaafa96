"""Owns what is compiled and what is on the device: executables by bucket, parameters, the cache."""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxinfer.attention import Batch
from jaxinfer.cache import cache_shapes
from jaxinfer.engine.buckets import Buckets
from jaxinfer.engine.request import Request
from jaxinfer.engine.scheduler import Schedule
from jaxinfer.engine.step import DecodeRows, Sampled, make_decode, make_step
from jaxinfer.models.model import Model, Params
from jaxinfer.sampling.arrays import RowSampling, SamplingArrays
from jaxinfer.sampling.sample import Logprobs


@dataclass
class Rows:
    """What one call sampled, on the host: row r's tokens are tokens[:count[r], r]; logprobs only if a row asked."""

    tokens: np.ndarray
    count: np.ndarray
    logprobs: Logprobs | None


class Runner:
    """Runs schedules. The cache is donated to every call, so there is one of it at any time."""

    def __init__(
        self,
        model: Model,
        params: Params,
        *,
        buckets: Buckets,
        num_pages: int,
        page_size: int,
        max_model_len: int,
        max_steps: int,
        device: jax.Device,
        on_compile: Callable[[str], None] | None = None,
    ):
        self.model = model
        self.params = params
        self.buckets = buckets
        self.table_width = -(-max_model_len // page_size)
        self.max_steps = max_steps
        self.device = device
        self.on_compile = on_compile
        self.compile_seconds = 0.0
        self.compilations = 0
        config = model.config
        dtype = next(iter(model.abstract.values())).dtype
        shapes = cache_shapes(config.num_layers, num_pages, page_size, config.num_kv_heads, config.head_dim, dtype)
        # Compiled, not eager: one zero-filled pool, no temporaries.
        self._zeros = jax.jit(lambda: jax.tree.map(lambda s: jax.numpy.zeros(s.shape, s.dtype), shapes))
        with jax.default_device(device):
            self.cache = self._zeros()
        self._step = jax.jit(make_step(model), donate_argnums=1)
        self._decode = jax.jit(make_decode(model, max_steps), donate_argnums=1)
        self._executables: dict[tuple[str, int, int], Any] = {}

    def run(self, schedule: Schedule) -> Rows:
        """Runs one call and waits for its tokens."""
        if schedule.chunks:
            sampled = self._run_step(schedule)
        else:
            sampled = self._run_decode(schedule)
        wanted = any(request.params.logprobs is not None for request in schedule.requests)
        tokens, count, info = jax.device_get((sampled.tokens, sampled.count, sampled.logprobs if wanted else None))
        return Rows(tokens, count, info)

    def recover(self) -> None:
        """After a broken-off call (Ctrl-C): the cache was donated to it, and its result may never have arrived."""
        if any(array.is_deleted() for array in jax.tree.leaves(self.cache)):
            with jax.default_device(self.device):
                self.cache = self._zeros()

    def close(self) -> None:
        """Frees the device's memory now instead of when the last reference goes."""
        for array in jax.tree.leaves((self.params, self.cache)):
            if not array.is_deleted():
                array.delete()
        self.params, self.cache = {}, ()
        self._executables.clear()
        # On CPU weights lie in numpy's memory. JAX lets go of it when Python collects garbage, and glibc keeps freed
        # pieces below 32 MB until it is told not to.
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
        if trim is not None:
            trim(0)

    def _run_step(self, schedule: Schedule) -> Sampled:
        requests = schedule.requests
        counts = [1] * len(schedule.decode) + [count for _, count in schedule.chunks]
        total = sum(counts)
        size = Buckets.fit(self.buckets.mixed_rows, len(requests))
        length = Buckets.fit(self.buckets.tokens, total)
        tokens, positions, row = (np.zeros(length, np.int32) for _ in range(3))
        q_start = np.full(size + 1, total, np.int32)
        q_start[0] = 0
        kv_len = np.zeros(size, np.int32)
        start = 0
        for i, (request, count) in enumerate(zip(requests, counts, strict=True)):
            end, past = start + count, request.computed
            tokens[start:end] = request.tokens[past : past + count]
            positions[start:end] = np.arange(past, past + count)
            row[start:end] = i
            q_start[i + 1] = start = end
            kv_len[i] = past + count
        row[total:] = size - 1
        arrays: dict[str, Any] = {
            "tokens": tokens,
            "positions": positions,
            "row": row,
            "q_start": q_start,
            "kv_len": kv_len,
            "pages": self._pages(requests, size),
            "rows": np.array([len(schedule.decode), len(requests), len(requests)], np.int32),
            "logits_at": np.maximum(q_start[1:] - 1, 0),
        }
        arguments = (self.params, self.cache, Batch(**arrays), self._sampling(requests, size))
        sampled: Sampled
        sampled, self.cache = self._executable(self._step, ("step", length, size), arguments)(*arguments)
        return sampled

    def _run_decode(self, schedule: Schedule) -> Sampled:
        requests = schedule.decode
        size = Buckets.fit(self.buckets.decode, len(requests))
        tokens, positions, limit = (np.zeros(size, np.int32) for _ in range(3))
        for i, request in enumerate(requests):
            tokens[i] = request.tokens[-1]
            positions[i] = request.computed
            limit[i] = min(schedule.steps, request.room)
        rows = DecodeRows(tokens, positions, limit, self._pages(requests, size))
        steps = np.int32(schedule.steps)
        arguments = (self.params, self.cache, rows, self._sampling(requests, size), steps)
        sampled: Sampled
        sampled, self.cache = self._executable(self._decode, ("decode", size, size), arguments)(*arguments)
        return sampled

    def _executable(self, function: Any, key: tuple[str, int, int], arguments: tuple[Any, ...]) -> Any:
        """Ahead-of-time compiled: a bucket compiles once, and never behind our back."""
        found = self._executables.get(key)
        if found is None:
            if self.on_compile is not None:
                self.on_compile(f"compiling {key[0]} for {key[1]} tokens")
            start = time.perf_counter()
            with jax.default_device(self.device):
                found = function.lower(*arguments).compile()
            self.compile_seconds += time.perf_counter() - start
            self.compilations += 1
            self._executables[key] = found
            if self.on_compile is not None:
                self.on_compile("generating")
        return found

    def _pages(self, requests: Sequence[Request], size: int) -> np.ndarray:
        table = np.zeros((size, self.table_width), np.int32)
        for i, request in enumerate(requests):
            table[i, : len(request.pages)] = request.pages
        return table

    def _sampling(self, requests: Sequence[Request], size: int) -> SamplingArrays:
        rows = [RowSampling(r.params, r.seed, r.stop_ids, r.prompt_length + r.params.min_tokens) for r in requests]
        return SamplingArrays.of_rows(rows, size)
