"""Products with weights as they are kept, attention to keys where they are, in pages or in the stream, and recurrences,
on CPU, through XLA's foreign function interface.

XLA multiplies float32 well, but makes a float32 copy of any other weight in each product. The kernels (`micro.h`) read
each weight once. They are built with the package where there is a C++ compiler (`build.py`), for all instruction sets
that they know; which one runs is decided when they are loaded: `avx512` (with VNNI and BF16), `avx2` (with FMA),
`portable`, or less if JAXINFER_CPU_KERNELS names less. `none` leaves everything to XLA, as where they weren't built.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType

LEVELS = ("portable", "avx2", "avx512")
VARIABLE = "JAXINFER_CPU_KERNELS"
DOT, INT4, GROUPED, GROUPED_INT4, LOW_RANK, ADAPTED_DOT, TAKE, ARGMAX, ATTEND, ATTEND_ROWS, *RECURRENCES = TARGETS = (
    *("jaxinfer_dot", "jaxinfer_dot_int4", "jaxinfer_grouped_dot", "jaxinfer_grouped_dot_int4"),
    *("jaxinfer_low_rank", "jaxinfer_adapted_dot"),
    *("jaxinfer_take", "jaxinfer_argmax", "jaxinfer_attention", "jaxinfer_attention_rows"),
    *("jaxinfer_linear_attention", "jaxinfer_selective_scan", "jaxinfer_convolution"),
)
LINEAR_ATTENTION, SCAN, CONVOLUTION = RECURRENCES
Weights = tuple[jax.Array, ...]
Products = Callable[[jax.Array, Weights], list[jax.Array]]
OnEach = Callable[[Products], Products]


class Kernels(NamedTuple):
    """What there is for this CPU.

    level: the instruction set that is used, one of LEVELS; None where XLA does all.
    why: in words.
    """

    level: str | None
    why: str


@functools.cache
def kernels() -> Kernels:
    """Loads and registers them, once."""
    wanted = os.environ.get(VARIABLE, LEVELS[-1])
    if wanted not in (*LEVELS, "none"):
        raise ValueError(f"{VARIABLE} is {wanted!r}: it must be one of {', '.join(LEVELS)}, none")
    if wanted == "none":
        return Kernels(None, f"{VARIABLE} is none")
    folder = Path(__file__).parent
    built = [folder / f"_kernels{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    path = next((file for file in built if file.exists()), None)
    if path is None:
        return Kernels(None, "they were not built: install a C++ compiler (g++ or clang++), then jaxinfer again")
    try:
        library = ctypes.CDLL(os.fspath(path))
        for name in TARGETS:
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    except Exception as error:  # of the linker, and of a jaxlib that is older than the one they were built for
        why = " ".join(str(error).split())
        return Kernels(None, f"they can't be loaded ({why}): install jaxinfer again")
    level = LEVELS[library.jaxinfer_level(LEVELS.index(wanted))]
    return Kernels(level, f"{VARIABLE} is {wanted}" if VARIABLE in os.environ else "the best that this CPU has")


def multiplies(activations: str, weights: str) -> bool:
    """Whether there is a kernel for these types here."""
    return kernels().level is not None and weights in {
        "int8": ("int8",),
        "bfloat16": ("bfloat16", "int8", "float8_e4m3fn"),
        # XLA's own product is good where there are no wide vectors.
        "float32": ("bfloat16", "int8", "float8_e4m3fn", *(() if kernels().level == "portable" else ("float32",))),
    }.get(activations, ())


def alone(apart: Sequence[str] = ()) -> bool:
    """Whether arrays are what one device has, mesh axes `apart` left aside: XLA would put those together that it has
    split over a mesh itself."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return all(axis in apart or mesh.shape[axis] == 1 or kind != AxisType.Auto for axis, kind in kinds)


def products(
    x: jax.Array,
    weights: Weights,
    reference: Products,
    rounds: bool = False,
    on_each: OnEach | None = None,
) -> list[jax.Array]:
    """`x [T, K]` times each `weight [N, K]` transposed, `[T, N]`: float32, or int32 of two that are int8.

    By a kernel in programs for a CPU, if there is one for these types, else `reference(x, weights)`. rounds: where that
    is faster (`avx512`, weights of 8 or 16 bits), activations in float32 may become bfloat16, two each from 5 tokens on
    and one from 16 on; products are summed in float32 all the same. on_each: makes the kernel's call one that each
    device of a mesh does with its part.
    """
    return _products(reference, rounds, on_each, x, weights)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _products(
    reference: Products, rounds: bool, on_each: OnEach | None, x: jax.Array, weights: Weights
) -> list[jax.Array]:
    kind = jnp.dtype(jnp.int32 if x.dtype == jnp.int8 else jnp.float32)

    def call(x: jax.Array, weights: Weights) -> list[jax.Array]:
        outs = [jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), kind) for weight in weights]
        return list(jax.ffi.ffi_call(DOT, outs, vmap_method="sequential")(x, *weights, rounds=rounds))

    return list(lax.platform_dependent(x, weights, cpu=on_each(call) if on_each else call, default=reference))


@_products.defjvp
def _products_jvp(
    reference: Products,
    rounds: bool,
    on_each: OnEach | None,
    primals: tuple[jax.Array, Weights],
    tangents: tuple[jax.Array, Weights],
) -> tuple[list[jax.Array], list[jax.Array]]:
    (x, weights), (dx, dweights) = primals, tangents
    changes = reference(dx, weights)
    for i, change in enumerate(dweights):
        if change.dtype != jax.dtypes.float0:
            changes[i] += reference(x, (change,))[0]
    return _products(reference, rounds, on_each, x, weights), changes


def products_int4(
    x: jax.Array,
    weights: Sequence[Weights],
    reference: Callable[[], list[jax.Array]],
    rounds: bool = False,
    table: Sequence[float] = (),
) -> list[jax.Array]:
    """`x [T, K]` times each weight of int4 transposed, `[T, N]` float32: see `products`.

    Of a weight there are values, uint8 `[N, K / 2]`, two's complement, the even column's in the low four bits; scales,
    f32 or e8m0 `[N, K / size]` of groups of `size` columns, a multiple of 32; and perhaps zeros, int8 of the same
    shape, which are taken off the values. From 8 tokens on weights are dequantized a few rows at a time, and where
    activations may be rounded so are they. table: the 16 numbers that values stand for instead of themselves.
    """
    if not _multiplies_int4(x, weights):
        return reference()
    outs = [jax.ShapeDtypeStruct((x.shape[0], weight[0].shape[0]), jnp.dtype(jnp.float32)) for weight in weights]
    numbers = np.asarray(table, np.float32)
    call = functools.partial(jax.ffi.ffi_call(INT4, outs, vmap_method="sequential"), rounds=rounds, table=numbers)
    flat = [array for weight in weights for array in weight]
    return list(lax.platform_dependent(x, *flat, cpu=call, default=lambda *_: reference()))


def _multiplies_int4(x: jax.Array, weights: Sequence[Weights]) -> bool:
    fits = x.ndim == 2 and x.dtype.name in ("float32", "bfloat16")
    fits = fits and all(x.shape[1] % (32 * weight[1].shape[-1]) == 0 for weight in weights)
    return fits and kernels().level is not None and alone()


def grouped_products(
    x: jax.Array,
    sizes: jax.Array,
    weights: Weights,
    reference: Callable[[], list[jax.Array]],
    rounds: bool = False,
    scales: Weights = (),
    factors: jax.Array | None = None,
) -> list[jax.Array]:
    """`x [M, K]`, of which the first sizes[0] rows are the first expert's and so on, times each `weight [E, N, K]`
    transposed, `[M, N]`, zeros where a row is nobody's: see `products`. Experts without rows are not read. scales: f32
    [E, N] of each weight, which products are multiplied with; factors: f32 [M, 1] of each row, which they are then too.
    """
    if x.ndim != 2 or not multiplies(x.dtype.name, weights[0].dtype.name) or not alone():
        return reference()
    kind = jnp.dtype(jnp.int32 if x.dtype == jnp.int8 else jnp.float32)
    flat, options = [(weight,) for weight in weights], {"rounds": rounds}
    return _grouped(GROUPED, kind, x, sizes, flat, reference, options, (scales, factors))


def grouped_products_int4(
    x: jax.Array,
    sizes: jax.Array,
    weights: Sequence[Weights],
    reference: Callable[[], list[jax.Array]],
    rounds: bool = False,
    table: Sequence[float] = (),
) -> list[jax.Array]:
    """The same of weights as `products_int4` has them, `[E, N, K / 2]` and `[E, N, K / size]`."""
    if not _multiplies_int4(x, weights):
        return reference()
    options = {"rounds": rounds, "table": np.asarray(table, np.float32)}
    return _grouped(GROUPED_INT4, jnp.dtype(jnp.float32), x, sizes, weights, reference, options)


def _grouped(
    target: str,
    kind: np.dtype[Any],
    x: jax.Array,
    sizes: jax.Array,
    weights: Sequence[Weights],
    reference: Callable[[], list[jax.Array]],
    options: Mapping[str, Any],
    applied: tuple[Weights, jax.Array | None] = ((), None),
) -> list[jax.Array]:
    shapes = [jax.ShapeDtypeStruct((x.shape[0], weight[0].shape[1]), kind) for weight in weights]

    def call(
        x: jax.Array, sizes: jax.Array, applied: tuple[Weights, jax.Array | None], *flat: jax.Array
    ) -> list[jax.Array]:
        outs = list(jax.ffi.ffi_call(target, shapes, vmap_method="sequential")(x, sizes, *flat, **options))
        scales, factors = applied
        if not scales:
            return outs
        ends = jnp.cumsum(sizes)
        owners = jnp.searchsorted(ends, jnp.arange(x.shape[0], dtype=ends.dtype), side="right", method="compare_all")
        rows = [scale.at[owners].get(mode="clip") for scale in scales]
        outs = [out.astype(jnp.float32) * row for out, row in zip(outs, rows, strict=True)]
        if factors is None:
            return outs
        factors = jnp.where((owners < ends.shape[0])[:, None], factors, 0)  # what is nobody's may be anything
        return [out * factors for out in outs]

    flat = [array for weight in weights for array in weight]
    return list(lax.platform_dependent(x, sizes, applied, *flat, cpu=call, default=lambda *_: reference()))


def low_rank(
    x: jax.Array,
    slot: jax.Array,
    outs: Sequence[jax.Array],
    adapters: Sequence[Weights],
    share: float,
    reference: Callable[[], list[jax.Array]],
) -> list[jax.Array]:
    """Products `outs`, each f32 `[T, N]`, of `x [T, K]`, with what adapters make of them: `gain * (out + x a b) + share
    * shift`, each row with those of its slot, i32[T]; as they are where it has none. Only slots with rows are read.

    adapters: of each product a `[S, R, K]`, b `[S, R, N]`, and perhaps gain and shift, f32 `[S, N]`.
    """
    if kernels().level is None or not _adapts(x, adapters):
        return reference()
    given = [array for out, own in zip(outs, adapters, strict=True) for array in (out, *own)]
    shapes = [jax.ShapeDtypeStruct(out.shape, out.dtype) for out in outs]
    aliases = {2 + i * (1 + len(adapters[0])): i for i in range(len(outs))}
    call = jax.ffi.ffi_call(LOW_RANK, shapes, vmap_method="sequential", input_output_aliases=aliases)

    def by_kernel(*arrays: jax.Array) -> list[jax.Array]:
        return list(call(*arrays, share=np.float32(share)))

    return list(lax.platform_dependent(x, slot, *given, cpu=by_kernel, default=lambda *_: reference()))


def adapted_products(
    x: jax.Array,
    slot: jax.Array,
    weights: Sequence[Weights],
    adapters: Sequence[Weights],
    share: float,
    rounds: bool,
    reference: Callable[[], list[jax.Array]],
) -> list[jax.Array]:
    """`products` of f32 `x [T, K]` with what `low_rank` adds to them, at once: threads wake up once. weights: of each
    its values `[N, K]`, and perhaps the scales of products with them, f32 `[N]`."""
    if not _adapts(x, adapters) or not multiplies(x.dtype.name, weights[0][0].dtype.name):
        return reference()
    given = [array for weight, own in zip(weights, adapters, strict=True) for array in (*weight, *own)]
    shapes = [jax.ShapeDtypeStruct((x.shape[0], weight[0].shape[0]), jnp.dtype(jnp.float32)) for weight in weights]
    call = jax.ffi.ffi_call(ADAPTED_DOT, shapes, vmap_method="sequential")

    def by_kernel(*arrays: jax.Array) -> list[jax.Array]:
        return list(call(*arrays, rounds=rounds, scaled=len(weights[0]) > 1, share=np.float32(share)))

    return list(lax.platform_dependent(x, slot, *given, cpu=by_kernel, default=lambda *_: reference()))


def _adapts(x: jax.Array, adapters: Sequence[Weights]) -> bool:
    kinds = {array.dtype.name for own in adapters for array in own[:2]}
    return x.dtype == jnp.float32 and x.ndim == 2 and kinds in ({"bfloat16"}, {"float32"}) and alone()


def take(table: jax.Array, ids: jax.Array, reference: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
    """Rows of `table [V, D]`: `[T, D]`; ids beyond it give its last row."""
    if not (kernels().level and ids.ndim == 1 and alone()):
        return reference(table, ids)
    out = jax.ShapeDtypeStruct((*ids.shape, table.shape[1]), table.dtype)
    return jax.ffi.ffi_call(TAKE, out, vmap_method="sequential")(table, ids)


def argmax(x: jax.Array, reference: Callable[[jax.Array], tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """The highest number of each row of `x [R, V]`, f32[R], and where it is, i32[R]: the first one of several. NaN is
    the highest. In programs for a CPU."""
    if not (kernels().level and alone()):
        return reference(x)
    outs = [jax.ShapeDtypeStruct(x.shape[:1], kind) for kind in (jnp.float32, jnp.int32)]
    highest, place = jax.ffi.ffi_call(ARGMAX, outs, vmap_method="sequential")(x)
    return highest, place


def or_none(x: jax.Array | None) -> jax.Array:
    """As kernels take what may not be there: in float32, empty then."""
    return jnp.zeros(0, "float32") if x is None else x.astype("float32")


class Rows(NamedTuple):
    """Of a stream of tokens those that go on from a state: row r has tokens cu_q_lens[r]:cu_q_lens[r + 1], the last of
    kv_lens[r], none if that is 0, and goes on from what is in its slot, or from zeros if they are all that it has.

    cu_q_lens, kv_lens, slots: i32[R + 1], i32[R], i32[R].
    """

    cu_q_lens: jax.Array
    kv_lens: jax.Array
    slots: jax.Array


Recurred = tuple[jax.Array, jax.Array]  # what comes out of each token, zeros of those of no row, and states after them


def linear_attention(
    inputs: Sequence[jax.Array], states: jax.Array, rows: Rows, reference: Callable[[], Recurred]
) -> Recurred:
    """`[T, H, D]` and `[slots, H, d, D]`, all in float32; what is in slots of no row stays.

    inputs: q and k `[T, K, d]`, v `[T, H, D]`, the logarithm of decays `[T, H]`, and, by the delta rule, its factors.
    """
    return _recurred(LINEAR_ATTENTION, inputs[2].shape, inputs, states, rows, reference)


def selective_scan(
    inputs: Sequence[jax.Array], states: jax.Array, rows: Rows, reference: Callable[[], Recurred]
) -> Recurred:
    """`[T, C]` and `[slots, C, N]`: see `linear_attention`.

    inputs: x and time steps `[T, C]`, b and c `[T, N]`, and a `[C, N]`, none of which is above 0.
    """
    return _recurred(SCAN, inputs[0].shape, inputs, states, rows, reference)


def convolution(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    states: jax.Array,
    rows: Rows,
    reference: Callable[[], Recurred],
) -> Recurred:
    """Of `x [T, ...]`, weight `[..., width]`, bias `[...]` and last inputs `[slots, width - 1, ...]`: see
    `linear_attention`."""
    return _recurred(CONVOLUTION, x.shape, (x, weight, or_none(bias)), states, rows, reference)


def _recurred(
    target: str,
    shape: tuple[int, ...],
    inputs: Sequence[jax.Array],
    states: jax.Array,
    rows: Rows,
    reference: Callable[[], Recurred],
) -> Recurred:
    if kernels().level is None or not alone():
        return reference()
    after, out = (jax.ShapeDtypeStruct(size, jnp.dtype(jnp.float32)) for size in (states.shape, shape))
    call = jax.ffi.ffi_call(target, (after, out), vmap_method="sequential", input_output_aliases={0: 0})

    def by_kernel(*arrays: jax.Array) -> Recurred:
        after, out = call(*arrays)
        return out, after

    arrays = states, *rows, *(x.astype(jnp.float32) for x in inputs)
    return lax.platform_dependent(*arrays, cpu=by_kernel, default=lambda *_: reference())


kernels()  # compiled programs that are read from a file look for them by name
