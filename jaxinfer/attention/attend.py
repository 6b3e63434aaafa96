"""The one function that models call; how the cache is kept decides which implementation runs."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jaxinfer.attention.batch import Batch
from jaxinfer.attention.fused import attend_fused
from jaxinfer.attention.spec import AttentionSpec
from jaxinfer.attention.tpu import attend_packed
from jaxinfer.attention.xla import attend_split, attend_stream
from jaxinfer.cache import CacheLayout, FusedPages, GpuPages, LayerCache, PackedPages, kernel_problem
from jaxinfer.kernels import cpu
from jaxinfer.sharding import KV, TENSOR, on_tensor

KERNELS: dict[Any, str] = {
    FusedPages: "tokamax's ragged paged attention kernel",
    PackedPages: "JAX's ragged paged attention kernel",
    GpuPages: "a Triton kernel",
}


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: LayerCache | None,
    batch: Batch,
    spec: AttentionSpec,
) -> tuple[jax.Array, LayerCache | None]:
    """Writes `k`, `v` into the cache and lets `q` attend to all keys of its own row.

    q `[T, H, d]`, k and v `[T, K, d]`, K divides H. Returns out `[T, H, d]` (zeros or garbage for padding
    tokens) and the cache with this step's keys and values. `cache=None` attends within the batch alone.
    """
    if cache is None:
        return attend_stream(q, k, v, batch, spec), None
    if not spec.causal:
        raise ValueError("attention over a cache is causal; pass cache=None for attention in both directions")
    call: Any = functools.partial(_implementation(cache), spec=spec)
    if batch.mesh is None:
        return call(q, k, v, cache, batch)
    # Heads don't know of each other: each device does its own, with all rows of its shard.
    heads, kv_heads = PartitionSpec(None, TENSOR), PartitionSpec(None, KV)
    pages = PartitionSpec(None, None, KV) if isinstance(cache, PackedPages | FusedPages) else kv_heads
    split = on_tensor(call, (heads, kv_heads, kv_heads, pages, PartitionSpec()), (heads, pages))
    return split(q, k, v, cache, dataclasses.replace(batch, mesh=None))


def attention_in_words(
    layout: CacheLayout, dtype: jax.typing.DTypeLike, head_dim: int, queries: int, device: jax.Device
) -> str:
    """What attends to such a cache there, and where it is plain XLA, why. dtype: of activations; queries: heads of them
    that have one key head."""
    if layout.pages in KERNELS:
        return KERNELS[layout.pages]
    if device.platform == "cpu":
        problem = cpu.attention_problem(jax.numpy.dtype(dtype).name, head_dim, queries, layout.dtype.name)
        return f"plain XLA: {problem}" if problem else "a CPU kernel"
    if device.platform == "tpu" and jax.numpy.dtype(dtype) in (jax.numpy.bfloat16, jax.numpy.float32):
        return "plain XLA: attention is 'xla'"
    problem = kernel_problem(device, jax.numpy.dtype(dtype), head_dim)
    if problem is None:
        problem = "the kernel is taken with attention='pallas' alone"
    return f"plain XLA: {problem}"


def _implementation(cache: LayerCache) -> Any:
    if isinstance(cache, GpuPages):
        from jaxinfer.attention.gpu import attend_in_place  # imports Pallas, which takes its time

        return attend_in_place
    if isinstance(cache, FusedPages):
        return attend_fused
    return attend_packed if isinstance(cache, PackedPages) else attend_split
