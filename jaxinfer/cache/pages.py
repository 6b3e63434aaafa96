"""The pool of key/value pages: arrays of each layer, donated to every step.

Page 0 is never allocated to a sequence: padding tokens and finished rows write there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike

from jaxinfer.sharding import KV, ROWS, axis_size, compute_capability, devices_of, tpu_generation

LANES = 128  # the last axis of an array comes in multiples of this on TPU
SUBLANES = 8
AMPERE = 8.0  # the compute capability that Triton in JAX begins with
GPU_HEADS = (16, 32, 64, 128, 256)  # Triton's arrays are powers of two


class SplitPages(NamedTuple):
    """Keys and values of one layer, each `[pages, K, page_size, d]`, for attention in plain XLA.

    Heads before positions, because a block of keys is then one batched dot without a transposition; on CPU
    that was a quarter faster than `[pages, page_size, K, d]`. Pools of BITS are kept as integers.
    """

    k: jax.Array
    v: jax.Array


class QuantizedPages(NamedTuple):
    """The same in 8 bits, with scales f32 `[pages, K, page_size]` of each token and head."""

    k: jax.Array
    v: jax.Array
    k_scales: jax.Array
    v_scales: jax.Array


class GpuPages(NamedTuple):
    """The same, for the kernel that reads pages in place on NVIDIA GPUs."""

    k: jax.Array
    v: jax.Array


class PackedPages(NamedTuple):
    """Keys and values of one layer, `[pages, page_size, 2K, d]`, each head's key followed by its value, for the ragged
    paged attention kernel of TPUs: a page is one piece of memory, and a token one row of it. d is padded to 128,
    and so is K, to what fills tiles.
    """

    kv: jax.Array


class FusedPages(NamedTuple):
    """The same, `[pages, page_size, K, 2, d]`, for the kernel of tokamax, which writes keys and values itself."""

    kv: jax.Array


LayerCache = SplitPages | QuantizedPages | GpuPages | PackedPages | FusedPages
Cache = tuple[LayerCache, ...]
KV_DTYPES = {"int8": np.dtype(np.int8), "fp8": np.dtype(jnp.float8_e4m3fn)}
# XLA:CPU, as of JAX 0.10, can't write such floats: it would convert the whole pool there and back for each token.
BITS = {np.dtype(jnp.bfloat16): np.dtype(np.uint16), np.dtype(jnp.float8_e4m3fn): np.dtype(np.uint8)}
SCALE = np.dtype(np.float32)
FUSED = 0, 0, 17  # the first version of tokamax that has it so


def values_dtype(pool: jax.Array) -> np.dtype[Any]:
    """What a pool's values are, which may be kept as BITS."""
    return next((dtype for dtype, bits in BITS.items() if bits == pool.dtype), pool.dtype)


def tokamax_version() -> str | None:
    """None where it isn't installed, or is too old."""
    try:
        found = version("tokamax")
    except PackageNotFoundError:
        return None
    return found if tuple(map(int, re.findall(r"\d+", found)[:3])) >= FUSED else None


@dataclass(frozen=True)
class CacheLayout:
    """How keys and values are kept. num_kv_heads: of all parts together, and head_dim: both with their padding; parts:
    over how many devices they are split."""

    num_layers: int
    num_kv_heads: int
    parts: int
    head_dim: int
    dtype: np.dtype[Any]
    pages: type[LayerCache]

    @classmethod
    def choose(
        cls,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: DTypeLike,
        place: jax.Device | Mesh,
        attention: str = "auto",
        kv_cache_dtype: str = "auto",
    ) -> CacheLayout:
        """What suits the device and the attention that there is for it: see EngineConfig; dtype: of activations. Raises
        ValueError if "pallas", or a quantized cache, is asked for where it can't be."""
        parts, compute, device = axis_size(place, (KV,)), jnp.dtype(dtype), devices_of(place)[0]
        kind = KV_DTYPES.get(kv_cache_dtype, compute)
        by_kernel = compute in (jnp.bfloat16, jnp.float32)  # the TPU's knows no other types
        if not by_kernel or device.platform != "tpu" or attention == "xla":
            wanted = attention == "pallas"
            if wanted and (problem := kernel_problem(device, compute, head_dim)):
                raise ValueError(f"attention is 'pallas': {problem}; leave it out to have what applies")
            if wanted and kind != compute:
                raise ValueError(
                    f"kv_cache_dtype is {kv_cache_dtype!r}: on GPUs only attention='xla' reads such a cache"
                )
            pages = QuantizedPages if kind != compute else GpuPages if wanted else SplitPages
            return cls(num_layers, num_kv_heads, parts, head_dim, kind, pages)
        if kv_cache_dtype == "int8":
            raise ValueError(
                "kv_cache_dtype is 'int8': no kernel for TPUs reads such a cache; take fp8 or attention='xla'"
            )
        width = -(-head_dim // LANES) * LANES
        heads = num_kv_heads // parts
        kept, unquantized = (_padded_heads(heads, d) * parts for d in (kind, compute))
        if kind != compute and kept * kind.itemsize >= unquantized * compute.itemsize:
            raise ValueError(
                f"kv_cache_dtype is {kv_cache_dtype!r}: the kernel for TPUs keeps {kept // parts} heads of it on each "
                f"device for the {heads} that are there, which saves nothing; leave it out, or take less `tensor`"
            )
        fused = kept == num_kv_heads and kind == jnp.bfloat16 and _has_fused_kernel(device.device_kind)
        return cls(num_layers, kept, parts, width, kind, FusedPages if fused else PackedPages)

    @property
    def packed(self) -> bool:
        return self.pages is PackedPages

    @property
    def bytes_per_token(self) -> int:
        """Of cache on each device that one token of context takes in all layers together."""
        head = self.head_dim * self.dtype.itemsize + (SCALE.itemsize if self.pages is QuantizedPages else 0)
        return 2 * self.num_layers * (self.num_kv_heads // self.parts) * head

    @property
    def spec(self) -> PartitionSpec:
        """How the arrays are split over a mesh."""
        return PartitionSpec(ROWS, None, KV) if self.pages in (PackedPages, FusedPages) else PartitionSpec(ROWS, KV)

    def shapes(self, num_pages: int, page_size: int) -> Cache:
        """The pool as abstract arrays (`jax.ShapeDtypeStruct`), over all devices that split the heads."""
        heads = self.num_kv_heads
        layer: LayerCache
        if self.packed:
            kv = jax.ShapeDtypeStruct((num_pages, page_size, 2 * heads, self.head_dim), self.dtype)
            layer = PackedPages(kv)  # type: ignore[arg-type]
        elif self.pages is FusedPages:
            kv = jax.ShapeDtypeStruct((num_pages, page_size, heads, 2, self.head_dim), self.dtype)
            layer = FusedPages(kv)  # type: ignore[arg-type]
        else:
            kept = self.dtype if self.pages is GpuPages else BITS.get(self.dtype, self.dtype)
            k = jax.ShapeDtypeStruct((num_pages, heads, page_size, self.head_dim), kept)
            scales = (jax.ShapeDtypeStruct(k.shape[:3], SCALE),) * 2 if self.pages is QuantizedPages else ()
            layer = self.pages(k, k, *scales)  # type: ignore[arg-type,call-arg]
        return (layer,) * self.num_layers


def _padded_heads(heads: int, dtype: np.dtype[Any]) -> int:
    """The keys and values of a device have to fill whole tiles, which may have 1, 2, 4 or 8 rows of 4 bytes a lane."""
    packing = 4 // dtype.itemsize
    rows = -(-2 * heads // packing)
    rows = 1 << (rows - 1).bit_length() if rows < SUBLANES else -(-rows // SUBLANES) * SUBLANES
    return rows * packing // 2


def _has_fused_kernel(kind: str) -> bool:
    """For this kind of device: v5 and later."""
    return (tpu_generation(kind) or 0) >= 5 and tokamax_version() is not None


def kernel_problem(device: jax.Device, dtype: np.dtype[Any], head_dim: int) -> str | None:
    """Why no kernel can be used on this accelerator, or None."""
    capability = compute_capability(device)
    if device.platform == "tpu":
        return f"the kernel for TPUs is for bfloat16 and float32, and dtype is {dtype}"
    if capability is None or capability < AMPERE:
        here = device.platform if capability is None else f"a GPU of {capability}"
        return f"kernels are for TPUs and for NVIDIA GPUs of compute capability {AMPERE} and more, and this is {here}"
    if dtype.itemsize != 2:
        return f"the kernel for GPUs is for bfloat16 and float16, and dtype is {dtype}"
    if head_dim not in GPU_HEADS:
        return f"the kernel for GPUs is for head sizes {', '.join(map(str, GPU_HEADS))}, and the model has {head_dim}"
    return None
