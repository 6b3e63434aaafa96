"""Rows times their expert's part of a weight, on TPUs: a kernel in Pallas.

Work is a list of pairs (tile of rows, expert that has some of them), in which a tile stays in fast memory with what it
becomes, as in MegaBlocks (Gale et al., arXiv:2211.15841), and so does an expert's block of weights from one tile to the
next. Weights are read as they are kept, and become floats once for all tiles that meet them.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxinfer.kernels.tpu.kept import (
    BLOCK,
    LANES,
    Form,
    Kept,
    arrays_of,
    bytes_of,
    dequantize,
    floats_of,
    prepared,
    product,
)

SUBLANES = 32  # rows come in multiples of this, also of int8
WEIGHT_BYTES = 6 * 2**20  # of a block of weights, in floats if that is more
LEAST_MEMORY = 16 * 2**20  # bytes of fast memory that a kernel may use; more where rows are long


class Pairs(NamedTuple):
    """Work: tiles of rows, and experts that have some of them; beyond the last pair, its.

    tile, expert: i32[P].
    begin, end: i32[P], the expert's rows (exclusive).
    size: i32[1], how many pairs there are.
    """

    tile: jax.Array
    expert: jax.Array
    begin: jax.Array
    end: jax.Array
    size: jax.Array


def pairs_of(sizes: jax.Array, rows: int, tiles: int) -> Pairs:
    """rows: of a tile."""
    ends = jnp.cumsum(sizes)
    begins = ends - sizes
    first = begins // rows
    visits = jnp.where(sizes > 0, (ends - 1) // rows - first + 1, 0)
    done = jnp.cumsum(visits)
    number = jnp.minimum(jnp.arange(tiles + len(sizes) - 1, dtype=jnp.int32), jnp.maximum(done[-1] - 1, 0))
    expert = jnp.sum(number[:, None] >= done[None, :], axis=1, dtype=jnp.int32)
    # Looked up by comparing: a number out of an array takes the compiler longer.
    own = expert[:, None] == jnp.arange(len(sizes), dtype=jnp.int32)
    shift, begin, end = (jnp.sum(jnp.where(own, of, 0), axis=1) for of in (first - done + visits, begins, ends))
    return Pairs(number + shift, jnp.minimum(expert, len(sizes) - 1), begin, end, done[-1:])


def grouped_product(x: jax.Array, sizes: jax.Array, weight: Kept) -> jax.Array:
    """`x [M, in]`, the first sizes[0] rows the first expert's and so on, `[M, out]` float32; zeros where a row is
    nobody's."""
    count, ins = x.shape
    rows = min(LANES, -(-count // SUBLANES) * SUBLANES)
    tiles = -(-count // rows)
    x = jnp.pad(x, ((0, tiles * rows - count), (0, 0)))
    widest = max(weight.values.dtype.itemsize * (weight.ins // weight.values.shape[2]), x.dtype.itemsize)
    outs = whole_part(weight.outs, max(WEIGHT_BYTES // (widest * ins), 1))
    pairs = pairs_of(sizes.astype(jnp.int32), rows, tiles)
    dtype = floats_of(weight.form, x.dtype)
    scratch = [] if dtype is None else [pltpu.VMEM((outs, ins), dtype)]
    held = 2 * bytes_of(weight, outs, ins) + rows * (3 * ins + 4 * outs) * 4 + (outs * ins * 4 if scratch else 0)
    specs = [
        pl.BlockSpec(
            shape, functools.partial(lambda n, p, tile, expert, *_, place: place(expert[p], n, 0), place=place)
        )
        for shape, place in weight.blocks_of(outs, ins)
    ]
    out = pl.pallas_call(
        functools.partial(_kernel, form=weight.form, dtype=x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(pairs),
            grid=(weight.outs // outs, len(pairs.tile)),
            in_specs=[pl.BlockSpec((rows, ins), lambda n, p, tile, *_: (tile[p], 0)), *specs],
            out_specs=pl.BlockSpec((rows, outs), lambda n, p, tile, *_: (tile[p], n)),
            scratch_shapes=scratch,
        ),
        out_shape=jax.ShapeDtypeStruct((tiles * rows, weight.outs), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=max(LEAST_MEMORY, held + held // 4)
        ),
        name="grouped_product",
    )(*pairs, x, *weight.arrays)
    # What no pair has it leaves alone.
    return jnp.where(jnp.arange(count, dtype=jnp.int32)[:, None] < jnp.sum(sizes), out[:count], jnp.float32(0))


def whole_part(size: int, most: int) -> int:
    """The largest part, of whole blocks, that it is divided by and that is no larger than the most, if any is."""
    return next((size // n for n in range(1, size // BLOCK) if size % (n * BLOCK) == 0 and size // n <= most), BLOCK)


def _kernel(*refs: Any, form: Form | None, dtype: Any) -> None:
    pairs, x, rest = Pairs(*refs[:5]), refs[5], refs[6:]
    weight = list(rest[: arrays_of(form)])
    out, *scratch = rest[len(weight) :]
    p = pl.program_id(1)
    before = jnp.maximum(p - 1, 0)

    @pl.when(p < pairs.size[0])
    def visited() -> None:
        if scratch:
            assert form is not None

            @pl.when((p == 0) | (pairs.expert[before] != pairs.expert[p]))
            def read() -> None:
                dequantize(weight, form, scratch[0])

        values = scratch[0][...] if scratch else weight[0][0]
        new = product(prepared(x[...], form, dtype), values, weight, form)
        line = pairs.tile[p] * x.shape[0] + lax.broadcasted_iota(jnp.int32, (x.shape[0], 1), 0)
        own = (line >= pairs.begin[p]) & (line < pairs.end[p])
        is_first = (p == 0) | (pairs.tile[before] != pairs.tile[p])

        @pl.when(is_first)
        def alone() -> None:
            out[...] = jnp.where(own, new, 0.0)

        @pl.when(jnp.logical_not(is_first))
        def among_others() -> None:
            out[...] = jnp.where(own, new, out[...])
