"""The one function that models call; the batch says what attends."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxinfer.attention.batch import ForwardBatch
from jaxinfer.attention.relative import Relative
from jaxinfer.attention.rows import attend_rows
from jaxinfer.attention.spec import AttentionSpec
from jaxinfer.cache import LayerCache
from jaxinfer.sharding import KV, TENSOR, axis_size, on_tensor


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: LayerCache | None,
    batch: ForwardBatch,
    spec: AttentionSpec,
    sinks: jax.Array | None = None,
    relative: Relative | None = None,
) -> tuple[jax.Array, LayerCache | None]:
    """Writes `k`, `v` into the cache and lets `q` attend to all keys of its own row.

    q `[T, H, d]`, k and v `[T, K, d]`, K divides H. Returns out `[T, H, d]` (zeros or garbage for padding
    tokens) and the cache with this step's keys and values. `cache=None` attends within the batch alone, whose rows are
    then whole sequences. sinks: f32[H], one more score of each head, of what has no value (gpt-oss). relative: what
    scores get by distance.

    Where a mesh splits key/value heads into more parts than there are, or parts that they can't be split into evenly,
    the cache has them several times: see `LayerLayout.of`.
    """
    # Operands of all heads, if there are any.
    own: dict[str, Any] = {} if sinks is None else {"sinks": sinks}
    if relative is not None:
        own["relative"] = relative
    call: Any
    if cache is None:
        call, pages = functools.partial(_without_cache, spec=spec), PartitionSpec()
    elif not spec.causal or relative is not None:
        raise ValueError(
            "attention over a cache is causal and without regard to distances; pass cache=None for attention in both "
            "directions, or relative"
        )
    else:
        backend = batch.backend
        assert backend is not None, "a batch over a cache has what attends to it"
        # A cache group of chunks shows of each row the chunk that it is in, and nothing before it.
        call = functools.partial(backend, spec=dataclasses.replace(spec, chunk=None))
        pages = PartitionSpec(None, *backend.partition_spec[1:])
    if batch.mesh is None or (cache is None and jax.sharding.get_abstract_mesh().empty):
        return call(q, k, v, cache, batch, **own)
    times = math.lcm(k.shape[1], axis_size(batch.mesh, (KV,))) // k.shape[1]
    if times > 1:
        k, v = (jnp.repeat(heads, times, axis=1) for heads in (k, v))
    # Heads don't know of each other: each device does its own, with all rows of its shard.
    heads, kv_heads = PartitionSpec(None, TENSOR), PartitionSpec(None, KV)
    each = heads, kv_heads, kv_heads, pages, PartitionSpec(), PartitionSpec(TENSOR)

    def part(*args: Any) -> Any:
        return call(*args[:-1], **args[-1])

    return on_tensor(part, each, (heads, pages))(q, k, v, cache, dataclasses.replace(batch, mesh=None), own)


def _without_cache(
    q: jax.Array, k: jax.Array, v: jax.Array, cache: None, batch: ForwardBatch, *, spec: AttentionSpec, **own: Any
) -> tuple[jax.Array, None]:
    return attend_rows(q, k, v, batch, spec, own.get("sinks"), own.get("relative")), None
