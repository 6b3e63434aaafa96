"""Products by experts on TPUs, which XLA has no good way for: kernels of our own, in Pallas.

They could not be run on a TPU for this project yet: checked is what they compute, in JAX's interpreter of TPUs, which
finds races and gives NaN for memory that nobody wrote, and that they compile for each generation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.kernels.tpu.kept import Form, Kept, for_tpu, has_little_memory

__all__ = ["Form", "Kept", "grouped_products", "mixture_of_experts"]

Biases = tuple[jax.Array, ...]


def grouped_products(
    x: jax.Array, sizes: jax.Array, weights: Sequence[Kept], reference: Callable[[], list[jax.Array]]
) -> list[jax.Array]:
    """`x [M, K]`, of which the first sizes[0] rows are the first expert's and so on, times each `weight [E, N, K]`
    transposed, `[M, N]` float32, zeros where a row is nobody's. Experts without rows are not read. In programs for a
    TPU; elsewhere, and where a shape or dtype is none of the kernel's, the reference does it."""
    if not (for_tpu() and all(weight.suits(x.dtype) for weight in weights)):
        return reference()
    if has_little_memory() and any(weight.form for weight in weights):
        return reference()

    def call(x: jax.Array, sizes: jax.Array, *weights: Kept) -> list[jax.Array]:
        from jaxinfer.kernels.tpu.grouped import grouped_product

        return [grouped_product(x, sizes, weight) for weight in weights]

    return list(lax.platform_dependent(x, sizes, *weights, tpu=call, default=lambda *_: reference()))


def mixture_of_experts(
    x: jax.Array,
    experts: jax.Array,
    shares: jax.Array,
    weights: Sequence[Kept | None],
    biases: tuple[jax.Array, ...],
    gating: Callable[..., jax.Array],
    of_inputs: bool,
    total: int,
    reference: Callable[[], jax.Array],
) -> jax.Array:
    """Of each token `x [T, D]` the sum of what its experts i32[T, k] make of it, `down(gating(*raised))` times its
    share f32[T, k], or of the token times it: float32. Numbers that are no expert's here are left out, and a token has
    none twice. In programs for a TPU; elsewhere, and where there is no room or a kind is none of the kernel's, the
    reference does it.

    weights: those that raise, and down; None: one that no kernel takes. biases: of each `[E, N]`, or none. total: how
    many experts there are anywhere."""
    kept = tuple(weight for weight in weights if weight is not None)
    if not for_tpu() or len(kept) < len(weights) or not all(weight.suits(x.dtype) for weight in kept):
        return reference()
    if has_little_memory():
        return reference()
    from jaxinfer.kernels.tpu import experts as kernel

    hidden = [jax.ShapeDtypeStruct((1, weight.outs), jnp.float32) for weight in kept[:-1]]
    blocks = kernel.blocks_of(len(x), x.dtype, kept[:-1], kept[-1])
    if blocks is None or "erfc" in str(jax.make_jaxpr(gating)(*hidden)):  # which Pallas has not on TPUs
        return reference()
    in_tile = min(max(1 << (2 * experts.size // total).bit_length(), 32), kernel.ROWS)

    def call(
        x: jax.Array, experts: jax.Array, shares: jax.Array, weights: tuple[Kept, ...], biases: Biases
    ) -> jax.Array:
        outs = []
        for first in range(0, len(x), blocks.tokens):
            own = slice(first, first + blocks.tokens)
            rows = kernel.by_expert(experts[own], shares[own], weights[0].values.shape[0])
            outs.append(kernel.mixture(x[own], rows, weights, biases, gating, of_inputs, blocks, in_tile))
        return jnp.concatenate(outs)

    out: jax.Array = lax.platform_dependent(x, experts, shares, kept, biases, tpu=call, default=lambda *_: reference())
    return out
