"""Attention that stays as sharp over more tokens: queries grow with their position (Nakanishi, arXiv:2501.19399)."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Temperature:
    """Queries are multiplied by `1 + beta * log(1 + floor((position + ahead) / every))`.

    beta, every: see above, every in tokens.
    ahead: what is added to positions.
    """

    beta: float
    every: int
    ahead: int = 0

    def factors(self, positions: jax.Array) -> jax.Array:
        """Of each token, float32 `[T]`."""
        return 1.0 + self.beta * jnp.log1p(((positions + self.ahead) // self.every).astype(jnp.float32))
