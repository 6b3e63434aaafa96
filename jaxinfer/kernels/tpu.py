"""Products on TPUs that XLA has no good way for: by experts, with JAX's grouped matrix multiplication (Pallas).

The idea is that of MegaBlocks (Gale et al., arXiv:2211.15841).

It could not be run for this project yet: checked is that it compiles, and what it gives when it is interpreted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

LANES = 128  # the last axis of an array comes in multiples of this
SUBLANES = 16  # the one before it, in bfloat16
# Bytes of the two blocks of rows, and of the two of a weight, that are in fast memory, of which v5e gives 16 MiB.
ROWS_BYTES, WEIGHT_BYTES = 4 * 2**20, 6 * 2**20


def grouped_products(
    x: jax.Array, sizes: jax.Array, weights: tuple[jax.Array, ...], reference: Callable[[], list[jax.Array]]
) -> list[jax.Array]:
    """`x [M, K]`, of which the first sizes[0] rows are the first expert's and so on, times each `weight [E, N, K]`
    transposed, `[M, N]` float32, zeros where a row is nobody's. Experts without rows are not read. In programs for a
    TPU; elsewhere, and where a shape or dtype is none of the kernel's, the reference does it."""
    if not (_for_tpu() and all(multiplies(x, weight) for weight in weights)):
        return reference()

    def call(x: jax.Array, sizes: jax.Array, *weights: jax.Array) -> list[jax.Array]:
        return [grouped_product(x, sizes, weight) for weight in weights]

    return list(lax.platform_dependent(x, sizes, *weights, tpu=call, default=lambda *_: reference()))


def multiplies(x: jax.Array, weight: jax.Array) -> bool:
    """Whether the kernel is for these."""
    same = x.dtype == weight.dtype and x.dtype in (jnp.bfloat16, jnp.float32)
    return same and weight.shape[1] % LANES == 0 and weight.shape[2] % LANES == 0


def grouped_product(x: jax.Array, sizes: jax.Array, weight: jax.Array, interpret: bool = False) -> jax.Array:
    """By the kernel; interpret: on any device, slowly."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    count = x.shape[0]
    _, outs, ins = weight.shape
    tiles = tiling(count, outs, ins, x.dtype.itemsize)
    padded = jnp.pad(x, ((0, -count % tiles[0]), (0, 0)))
    rows = jnp.sum(sizes)
    some = sizes.at[0].add((rows == 0).astype(sizes.dtype))  # it may wait for a first tile that it never fetches
    full = jax.default_matmul_precision("highest") if x.dtype == jnp.float32 else contextlib.nullcontext()
    with full:
        out = gmm(padded, weight, some, tiling=tiles, transpose_rhs=True, interpret=interpret)
    # It leaves alone what is nobody's.
    return jnp.where(jnp.arange(count, dtype=rows.dtype)[:, None] < rows, out[:count], jnp.float32(0))


def tiling(rows: int, outs: int, ins: int, itemsize: int) -> tuple[int, int, int]:
    """Rows, inputs and outputs that are multiplied at a time. All inputs, where there is room: then an expert's weights
    are read once, however many tiles its rows are in. They take longer to come than 128 rows to be multiplied."""
    most_rows = min(LANES, -(-rows // SUBLANES) * SUBLANES)
    most_ins = min(ins, _whole(ROWS_BYTES // (2 * LANES * itemsize)))
    most_outs = _whole(WEIGHT_BYTES // (2 * most_ins * itemsize))
    return most_rows, most_ins, _whole(-(-outs // -(-outs // most_outs)) + LANES - 1)


def _whole(size: int) -> int:
    return max(size // LANES, 1) * LANES


def _for_tpu() -> bool:
    """Whether what is traced may be for a TPU: elsewhere nobody needs to wait for Pallas to be imported."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (jax.default_backend() if device is None else device.platform) == "tpu"
