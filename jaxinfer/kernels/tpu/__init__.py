"""Products by experts on TPUs, which XLA has no good way for: kernels of our own, in Pallas.

They could not be run on a TPU for this project yet: checked is what they compute, in JAX's interpreter of TPUs, which
finds races and gives NaN for memory that nobody wrote, and that they compile for each generation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
from jax import lax

from jaxinfer.kernels.tpu.kept import Form, Kept, for_tpu

__all__ = ["Form", "Kept", "grouped_products"]


def grouped_products(
    x: jax.Array, sizes: jax.Array, weights: Sequence[Kept], reference: Callable[[], list[jax.Array]]
) -> list[jax.Array]:
    """`x [M, K]`, of which the first sizes[0] rows are the first expert's and so on, times each `weight [E, N, K]`
    transposed, `[M, N]` float32, zeros where a row is nobody's. Experts without rows are not read. In programs for a
    TPU; elsewhere, and where a shape or dtype is none of the kernel's, the reference does it."""
    if not (for_tpu() and all(weight.suits(x.dtype) for weight in weights)):
        return reference()

    def call(x: jax.Array, sizes: jax.Array, *weights: Kept) -> list[jax.Array]:
        from jaxinfer.kernels.tpu.grouped import grouped_product

        return [grouped_product(x, sizes, weight) for weight in weights]

    return list(lax.platform_dependent(x, sizes, *weights, tpu=call, default=lambda *_: reference()))
