"""Attention within rows, without a cache: its time against that of scores over the whole stream, and against the same
products as one dense batch.

    python benchmarks/rows.py [--tokens 2048] [--lengths 32 128 512] [--heads 12] [--head-dim 64] [--dtype float32]

The stream is `tokens` long, of rows that all have one length. Ways take turns. Each time is the least of some, on the
clock, and of CPUs, which is what counts where others use the machine, too.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxinfer.attention import AttentionSpec, ForwardBatch
from jaxinfer.attention.rows import as_one, attend_rows, by_tiles
from jaxinfer.kernels.cpu import attention


def dense(q: jax.Array, k: jax.Array, v: jax.Array, length: int, spec: AttentionSpec) -> jax.Array:
    """Rows as a batch, of which nothing is masked, as there is no padding."""
    q, k, v = (x.reshape(-1, length, *x.shape[1:]) for x in (q, k, v))
    scores = jnp.einsum("rqhd,rkhd->rhqk", q, k, preferred_element_type=jnp.float32) * spec.scale
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("rhqk,rkhd->rqhd", weights, v).reshape(-1, *q.shape[2:])


def measured(ways: dict[str, Callable[[], Any]], times: int) -> dict[str, tuple[float, float]]:
    """Of each way the least seconds on the clock, and of CPUs."""
    least = dict.fromkeys(ways, (float("inf"), float("inf")))
    for turn in range(times + 1):
        for name, way in ways.items():
            clock, used = time.perf_counter(), time.process_time()
            jax.block_until_ready(way())
            now = time.perf_counter() - clock, time.process_time() - used
            if turn:  # the first one compiles
                least[name] = min(least[name][0], now[0]), min(least[name][1], now[1])
    return least


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--times", type=int, default=10)
    options = parser.parse_args()
    spec = AttentionSpec(options.head_dim**-0.5, causal=False)
    rng = np.random.default_rng(0)
    shape = options.tokens, options.heads, options.head_dim
    q, k, v = (jnp.asarray(rng.standard_normal(shape), options.dtype) for _ in range(3))
    table = Table("row", "way", "ms", "CPU ms", "of the stream's", "of a dense batch's")
    for length in options.lengths:
        batch = ForwardBatch.of_sequences([[0] * length] * (options.tokens // length), options.tokens)
        given = q, k, v, batch, None, None
        ways = {
            "the whole stream": functools.partial(jax.jit(functools.partial(as_one, spec=spec)), *given),
            "a dense batch": functools.partial(jax.jit(dense, static_argnums=(3, 4)), q, k, v, length, spec),
            "tiles in plain XLA": functools.partial(jax.jit(functools.partial(by_tiles, spec=spec)), *given),
        }
        if attention.attends_rows(options.dtype, 1):
            ways["the kernel"] = functools.partial(jax.jit(attend_rows, static_argnums=4), *given[:4], spec)
        results = measured(ways, options.times)
        stream, batched = results["the whole stream"], results["a dense batch"]
        for name, (clock, used) in results.items():
            shares = [f"1/{stream[1] / used:.1f}", f"{used / batched[1]:.2f}"]
            table.add_row(str(length), name, f"{1e3 * clock:.2f}", f"{1e3 * used:.2f}", *shares)
    Console().print(table)


if __name__ == "__main__":
    main()
