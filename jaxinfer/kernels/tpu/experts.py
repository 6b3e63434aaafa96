"""A mixture of experts on TPUs in one kernel in Pallas: rows gathered, multiplied, gated and summed in fast memory.

Tokens and what they become are there whole, a token's features as tiles of their own, so that one is read or added to
by whole registers. For each expert that has rows these are taken by their tokens' numbers, some at a time, multiplied
with its weights, which come once, and added to their tokens' sums. Rows of experts that are on other devices cost
nothing, and nothing is moved in memory but tokens, weights and sums.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
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

MEMORY = 54 * 2**20  # bytes of fast memory, of which a core of TPU7x has 64 MiB, and others more
ROWS, UNROLLED = 128, 8  # most that are multiplied at a time; tokens read and summed at a time
CHUNK = 128  # tokens that come or go at a time, at most


class Mixture(NamedTuple):
    """What experts make of tokens, besides their weights.

    tokens: i32[M], of the rows, by expert.
    shares: f32[M], what each row is multiplied with.
    sizes: i32[E], how many rows each expert has; the rest is nobody's. A token is no expert's twice.
    """

    tokens: jax.Array
    shares: jax.Array
    sizes: jax.Array


class Blocks(NamedTuple):
    """How a mixture is cut. tokens: at a time; hidden: of an expert's hidden numbers; bytes: of fast memory."""

    tokens: int
    hidden: int
    bytes: int


def by_expert(experts: jax.Array, shares: jax.Array, count: int) -> Mixture:
    """Of each token's experts i32[T, k], of which those below count are here, with its shares f32[T, k]."""
    rows, top_k = experts.size, experts.shape[1]
    owner = jnp.where((experts >= 0) & (experts < count), experts, count).reshape(-1).astype(jnp.int32)
    index = jnp.arange(rows, dtype=jnp.int32)
    # One sort of keys that differ: stable without being asked to be.
    _, tokens, shares = lax.sort(
        (owner * rows + index, index // top_k, shares.reshape(-1)), num_keys=1, is_stable=False
    )
    sizes = jnp.sum(owner[:, None] == jnp.arange(count, dtype=jnp.int32), axis=0, dtype=jnp.int32)
    return Mixture(tokens, shares, sizes)


def blocks_of(tokens: int, dtype: Any, raising: tuple[Kept, ...], down: Kept) -> Blocks | None:
    """As large as there is room for, of tokens first: weights come once for each block of them. None where there is no
    room."""
    tokens = -(-tokens // 16) * 16
    whole = down.form is not None and (down.form.columns > 0 or down.form.activations)
    cuts = [1] if whole else [n for n in range(1, down.ins // LANES + 1) if down.ins % (n * LANES) == 0]
    found = [own for n in cuts if (own := _blocks(tokens, dtype, raising, down, down.ins // n)) is not None]
    return max(found, key=lambda own: (own.tokens, own.hidden), default=None)


def _blocks(tokens: int, dtype: Any, raising: tuple[Kept, ...], down: Kept, hidden: int) -> Blocks | None:
    features, size = down.outs, jnp.dtype(dtype).itemsize
    weights = [*((w, hidden, features) for w in raising), (down, features, hidden)]
    token = -(-features // (8 * LANES)) * 8 * LANES * 4
    held = 2 * sum(bytes_of(w, n, k) for w, n, k in weights)
    held += sum(n * k * size for w, n, k in weights if floats_of(w.form, dtype) is not None)
    held += ROWS * (token + hidden * 16) + CHUNK * features * (4 + size) + 2**20
    held += 0 if down.form is None else BLOCK * max(features, hidden) * 16  # while they become floats
    room = (MEMORY - held) // (2 * token) - UNROLLED
    if room < min(tokens, CHUNK):
        return None
    parts = -(-tokens // (room // CHUNK * CHUNK if room < tokens else tokens))
    each = -(-tokens // parts)
    each = -(-each // CHUNK) * CHUNK if each > CHUNK else -(-each // 16) * 16
    return None if each > room else Blocks(each, hidden, held + 2 * (each + UNROLLED) * token)


def mixture(
    x: jax.Array,
    rows: Mixture,
    weights: tuple[Kept, ...],
    biases: tuple[jax.Array, ...],
    gating: Callable[..., jax.Array],
    of_inputs: bool,
    blocks: Blocks,
    in_tile: int = ROWS,
) -> jax.Array:
    """`x [T, D]`, no more tokens than `blocks` has, to float32 `[T, D]`: of each token the sum of its experts' `down(
    gating(*raising))`, each times its share, or of it times its share. weights: raising and down; biases `[E, N]`: of
    them, or none. in_tile: rows that are multiplied at a time."""
    count, features = x.shape
    *raising, down = weights
    padded = -(-count // CHUNK) * CHUNK if count > CHUNK else -(-count // 16) * 16
    x = jnp.pad(x, ((0, padded - count), (0, 0)))
    chunk, columns = min(padded, CHUNK), -(-features // (8 * LANES)) * 8
    hidden, parts = blocks.hidden, down.ins // blocks.hidden
    visits = min(len(rows.sizes), rows.tokens.shape[0])
    ends = jnp.cumsum(rows.sizes)
    there = rows.sizes > 0
    place = jnp.cumsum(there) - 1
    number = jnp.minimum(jnp.arange(visits, dtype=jnp.int32), jnp.maximum(place[-1], 0))
    own = there & (place == number[:, None])
    experts, begins, sizes = (
        jnp.sum(jnp.where(own, of, 0), axis=1, dtype=jnp.int32)
        for of in (jnp.arange(len(there), dtype=jnp.int32), ends - rows.sizes, rows.sizes)
    )
    size = jnp.sum(there, dtype=jnp.int32)[None]

    def spec(shape: tuple[int, ...], place: Callable[..., tuple[Any, ...]], lowers: bool) -> pl.BlockSpec:
        def index(g: jax.Array, j: jax.Array, experts: Any, begins: Any, sizes: Any, size: Any, *_: Any) -> Any:
            j = jnp.where(g < size[0], j, parts - 1)  # beyond the last one nothing comes
            return place(experts[g], 0, j) if lowers else place(experts[g], j, 0)

        return pl.BlockSpec(shape, index)

    kept = [(w, hidden, features, False) for w in raising] + [(down, features, hidden, True)]
    specs = [spec(*block, lowers) for w, n, k, lowers in kept for block in w.blocks_of(n, k)]
    for _, n, _, lowers in kept if biases else []:
        specs.append(spec((1, 1, n), lambda e, n, k: (e, 0, n), lowers))
    floats = [pltpu.VMEM((n, k), own) for w, n, k, _ in kept if (own := floats_of(w.form, x.dtype)) is not None]
    body = functools.partial(
        _kernel,
        forms=tuple(weight.form for weight in weights),
        biased=bool(biases),
        gating=gating,
        of_inputs=of_inputs,
        in_tile=in_tile,
        columns=columns,
        chunk=chunk,
    )
    out = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=6,
            grid=(visits, parts),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY), *specs],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[
                *(pltpu.VMEM(((padded + UNROLLED) * columns, LANES), jnp.float32) for _ in range(2)),
                pltpu.VMEM((in_tile * columns, LANES), jnp.float32),
                pltpu.VMEM((chunk, features), x.dtype),
                pltpu.VMEM((chunk, features), jnp.float32),
                *floats,
                pltpu.SemaphoreType.DMA,
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((padded, features), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=blocks.bytes + 4 * 2**20
        ),
        name="mixture_of_experts",
    )(
        *(experts, begins, sizes, size, rows.tokens, rows.shares),
        x,
        *(array for weight in weights for array in weight.arrays),
        *(bias[:, None] for bias in biases),
    )
    return out[:count]


def _kernel(
    *refs: Any,
    forms: tuple[Form | None, ...],
    biased: bool,
    gating: Callable[..., jax.Array],
    of_inputs: bool,
    in_tile: int,
    columns: int,
    chunk: int,
) -> None:
    _, begins, sizes, size, tokens, shares, x, *rest = refs
    weights = []
    for form in forms:
        weights.append(rest[: arrays_of(form)])
        rest = rest[arrays_of(form) :]
    biases, rest = (rest[: len(forms)], rest[len(forms) :]) if biased else ([], rest)
    out, all_in, all_out, some, coming, going, *rest, semaphore = rest
    floats = [None if floats_of(form, coming.dtype) is None else rest.pop(0) for form in forms]
    dtype, features = coming.dtype, coming.shape[1]
    g, j = pl.program_id(0), pl.program_id(1)
    nowhere = all_in.shape[0] // columns - UNROLLED  # a token that is none

    def tiles(token: Any, count: int = 1) -> Any:
        return pl.ds(pl.multiple_of(token * columns, 8), count * columns)

    def column(c: int, count: int, first: Any = 0) -> Any:
        """Of so many tokens, a line each."""
        return pl.ds(first * columns + c, count, stride=columns)

    def in_lines(ref: Any, count: int, first: Any = 0) -> jax.Array:
        pieces = [ref[column(c, count, first)] for c in range(features // LANES)]
        return jnp.concatenate(pieces, axis=1)

    def in_tiles(ref: Any, lines: jax.Array, first: Any = 0) -> None:
        for c in range(features // LANES):
            ref[column(c, len(lines), first)] = lines[:, c * LANES : (c + 1) * LANES]

    @pl.when((g == 0) & (j == 0))
    def begin() -> None:
        def clear(i: jax.Array, _: None) -> None:
            all_out[tiles(i * UNROLLED, UNROLLED)] = jnp.zeros((UNROLLED * columns, LANES), jnp.float32)

        lax.fori_loop(0, nowhere // UNROLLED + 1, clear, None)
        all_in[tiles(nowhere, UNROLLED)] = jnp.zeros((UNROLLED * columns, LANES), jnp.float32)

        def bring(i: jax.Array, _: None) -> None:
            copy = pltpu.make_async_copy(x.at[pl.ds(pl.multiple_of(i * chunk, 16), chunk)], coming, semaphore)
            copy.start()
            copy.wait()
            in_tiles(all_in, coming[...].astype(jnp.float32), i * chunk)

        lax.fori_loop(0, nowhere // chunk, bring, None)

    @pl.when(g < size[0])
    def visit() -> None:
        for form, own, numbers in zip(forms, weights, floats, strict=True):
            if form is not None and numbers is not None:
                dequantize(own, form, numbers)

        def multiplied(rows: Any, n: int) -> jax.Array:
            numbers = floats[n]
            values = weights[n][0][0] if numbers is None else numbers[...]
            return product(rows, values, weights[n], forms[n])

        def tile(i: jax.Array, _: None) -> None:
            first, here = begins[g] + i * in_tile, jnp.minimum(sizes[g] - i * in_tile, in_tile)

            def rows_of(r: jax.Array) -> list[tuple[Any, Any, Any]]:
                """Of some rows which they are, their tokens and shares."""
                found = []
                for line in (r * UNROLLED + u for u in range(UNROLLED)):
                    row = jnp.minimum(first + line, tokens.shape[0] - 1)
                    found.append((line, jnp.where(line < here, tokens[row], nowhere), shares[row]))
                return found

            def gather(r: jax.Array, _: None) -> None:
                rows = rows_of(r)
                for line, token, share in rows:
                    own = all_in[tiles(token)]
                    if of_inputs:
                        own = own * jnp.full((1, LANES), share).astype(dtype).astype(jnp.float32)
                    some[tiles(line)] = own

            def add(r: jax.Array, _: None) -> None:
                # All are read before one is written: tokens differ, and so nothing waits.
                rows = rows_of(r)
                sums = [
                    all_out[tiles(token)] + some[tiles(line)] * (1.0 if of_inputs else share)
                    for line, token, share in rows
                ]
                for (_, token, _), own in zip(rows, sums, strict=True):
                    all_out[tiles(token)] = own

            groups = pl.cdiv(here, UNROLLED)

            @pl.when(here < in_tile)
            def rest_of_tile() -> None:
                some[...] = jnp.zeros(some.shape, some.dtype)

            lax.fori_loop(0, groups, gather, None)
            lines = in_lines(some, in_tile).astype(dtype)
            ready = {form: prepared(lines, form, dtype) for form in forms[:-1]}
            raised = [multiplied(ready[form], n) for n, form in enumerate(forms[:-1])]
            if biased:
                raised = [out + bias[0].astype(jnp.float32) for out, bias in zip(raised, biases, strict=False)]
            hidden = gating(*raised).astype(dtype)
            lowered = multiplied(prepared(hidden, forms[-1], dtype), len(forms) - 1)
            if biased:
                lowered = lowered + biases[-1][0].astype(jnp.float32) * jnp.where(j == 0, 1.0, 0.0)
            in_tiles(some, lowered)
            lax.fori_loop(0, groups, add, None)

        lax.fori_loop(0, pl.cdiv(sizes[g], in_tile), tile, None)

    @pl.when((g == pl.num_programs(0) - 1) & (j == pl.num_programs(1) - 1))
    def end() -> None:
        def leave(i: jax.Array, _: None) -> None:
            going[...] = in_lines(all_out, chunk, i * chunk)
            copy = pltpu.make_async_copy(going, out.at[pl.ds(pl.multiple_of(i * chunk, 16), chunk)], semaphore)
            copy.start()
            copy.wait()

        lax.fori_loop(0, nowhere // chunk, leave, None)
