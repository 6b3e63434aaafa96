"""Products with weights as they are kept, and attention to pages where they are, on CPU, through XLA's foreign function
interface.

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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType

LEVELS = ("portable", "avx2", "avx512")
VARIABLE = "JAXINFER_CPU_KERNELS"
TARGET, INT4, ATTEND = "jaxinfer_dot", "jaxinfer_dot_int4", "jaxinfer_attend"
MOST_QUERIES = 128  # of a token that have one key
CACHES = ("float32", "bfloat16", "int8")
Product = Callable[[jax.Array, jax.Array], jax.Array]


class Kernels(NamedTuple):
    """level: the instruction set that is used, one of LEVELS, or None where XLA does all; why: in words."""

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
    found = next((file for file in built if file.exists()), None)
    if found is None:
        return Kernels(None, "they were not built: install a C++ compiler (g++ or clang++), then jaxinfer again")
    try:
        library = ctypes.CDLL(os.fspath(found))
        for name in (TARGET, INT4, ATTEND):
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    except Exception as error:  # of the linker, and of a jaxlib that is older than the one they were built for
        why = " ".join(str(error).split())
        return Kernels(None, f"they can't be loaded ({why}): install jaxinfer again")
    level = LEVELS[library.jaxinfer_level(LEVELS.index(wanted))]
    return Kernels(level, f"{VARIABLE} is {wanted}" if VARIABLE in os.environ else "the best that this CPU has")


def product(x: jax.Array, weight: jax.Array, reference: Product, rounds: bool = False) -> jax.Array:
    """`x [T, K]` times `weight [N, K]` transposed, `[T, N]`: float32, or int32 of two that are int8.

    By a kernel in programs for a CPU, if there is one for these types, else `reference(x, weight)`. rounds: where that
    is faster (`avx512`, from 16 tokens on, weights in bfloat16 or int8), activations in float32 may be rounded to
    bfloat16; products are summed in float32 all the same.
    """
    return _product(reference, rounds, x, weight) if _applies(x, weight) else reference(x, weight)


def multiplies(activations: str, weights: str) -> bool:
    """Whether there is a kernel for these types here."""
    return kernels().level is not None and weights in {
        "int8": ("int8",),
        "bfloat16": ("bfloat16", "int8"),
        # XLA's own product is good where there are no wide vectors.
        "float32": ("bfloat16", "int8", *(("float32",) if kernels().level != "portable" else ())),
    }.get(activations, ())


def _applies(x: jax.Array, weight: jax.Array) -> bool:
    if x.ndim != 2 or not multiplies(x.dtype.name, weight.dtype.name):
        return False
    if weight.dtype == jnp.float32 and x.shape[0] == 1:
        return False  # bound by memory, and XLA reads it as fast
    return _alone()


def _alone() -> bool:
    """Whether arrays are what one device has: XLA would put those together that it has split over a mesh itself."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return all(mesh.shape[axis] == 1 or kind != AxisType.Auto for axis, kind in kinds)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _product(reference: Product, rounds: bool, x: jax.Array, weight: jax.Array) -> jax.Array:
    kind = jnp.dtype(jnp.int32 if x.dtype == jnp.int8 else jnp.float32)
    out = jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), kind)
    call = functools.partial(jax.ffi.ffi_call(TARGET, out, vmap_method="sequential"), rounds=rounds)
    return lax.platform_dependent(x, weight, cpu=call, default=reference)


@_product.defjvp
def _product_jvp(
    reference: Product, rounds: bool, primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (x, weight), (dx, dweight) = primals, tangents
    change = reference(dx, weight)
    if dweight.dtype != jax.dtypes.float0:
        change += reference(x, dweight)
    return _product(reference, rounds, x, weight), change


def product_int4(
    x: jax.Array, values: jax.Array, scales: jax.Array, reference: Callable[[], jax.Array], rounds: bool = False
) -> jax.Array:
    """`x [T, K]` times a weight of int4 transposed, `[T, N]` float32: see `product`.

    values: uint8 `[N, K / 2]`, two's complement, the even column's in the low four bits. scales: f32 `[N, K / size]`
    of groups of `size` columns, a multiple of 32. From 8 tokens on weights are dequantized a few rows at a time, and
    where activations may be rounded so are they.
    """
    groups = scales.shape[1]
    fits = x.ndim == 2 and x.dtype.name in ("float32", "bfloat16") and x.shape[1] % (32 * groups) == 0
    if not (fits and kernels().level and _alone()):
        return reference()
    out = jax.ShapeDtypeStruct((x.shape[0], values.shape[0]), jnp.dtype(jnp.float32))
    call = functools.partial(jax.ffi.ffi_call(INT4, out, vmap_method="sequential"), rounds=rounds)
    return lax.platform_dependent(x, values, scales, cpu=call, default=lambda *_: reference())


def attend(
    q: jax.Array,
    pools: Sequence[jax.Array],
    pages: jax.Array,
    kv_len: jax.Array,
    scale: float,
    window: int | None,
    reference: Callable[[], jax.Array],
) -> jax.Array:
    """Attention of each row's last token, `q [R, K, G, d]`, to keys and values in pages: `[R, K, G, d]`, zeros for rows
    whose kv_len, i32[R], is 0.

    pools: keys and values `[P, K, page_size, d]`, in 8 bits their scales `[P, K, page_size]` too. pages: i32[R, ...].
    window: that many positions are seen; None is all. By a kernel where there is one, else what `reference` gives.
    """
    fits = q.dtype == jnp.float32 and q.shape[3] % 16 == 0 and q.shape[2] <= MOST_QUERIES
    if not (fits and pools[0].dtype.name in CACHES and kernels().level and _alone()):
        return reference()
    call = functools.partial(
        jax.ffi.ffi_call(ATTEND, jax.ShapeDtypeStruct(q.shape, q.dtype)),
        scale=np.float32(scale),
        window=np.int64(window or 0),
    )
    return lax.platform_dependent(q, pages, kv_len, *pools, cpu=call, default=lambda *_: reference())


kernels()  # compiled programs that are read from a file look for them by name
