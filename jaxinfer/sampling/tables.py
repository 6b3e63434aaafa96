"""Grammars as tables on the device: in each state, which tokens may come, and where each of them leads.

States are kept in blocks; a grammar has some of them, which need not be neighbours, and gives them back.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer.sampling.table_sizes import BLOCK, CLASSES


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenTables:
    """B blocks of S states; V tokens are in the vocabulary. Of one block, as the host gives it, there is no axis of B.

    masks: u32[B, S, V/32], a bit for each token that may come.
    classes: u16[B, V], which class a token is of in this block's grammar.
    next: u16[B, S, C], the state that a token of a class leads to, counted through all blocks.
    ends: u8[B, S], see table_sizes.py.
    """

    masks: jax.Array | np.ndarray
    classes: jax.Array | np.ndarray
    next: jax.Array | np.ndarray
    ends: jax.Array | np.ndarray

    @staticmethod
    def shapes(vocab: int, *blocks: int) -> TokenTables:
        """As abstract arrays, with an axis of so many blocks in front, if any."""

        def array(dtype: str, *shape: int) -> Any:
            return jax.ShapeDtypeStruct((*blocks, *shape), jnp.dtype(dtype))

        words = -(-vocab // 32)
        return TokenTables(
            array("uint32", BLOCK, words),
            array("uint16", words * 32),
            array("uint16", BLOCK, CLASSES),
            array("uint8", BLOCK),
        )

    def put(self, block: jax.Array, value: TokenTables) -> TokenTables:
        """With another value of a block."""
        names = [field.name for field in fields(self)]
        return TokenTables(
            **{n: lax.dynamic_update_index_in_dim(getattr(self, n), getattr(value, n), block, 0) for n in names}
        )

    def allowed(self, state: jax.Array) -> jax.Array:
        """What may come in each state, u32[R, V/32]."""
        return jnp.asarray(self.masks)[state // BLOCK, state % BLOCK]

    def after(self, state: jax.Array, token: jax.Array) -> jax.Array:
        """The next states."""
        of_class = jnp.asarray(self.classes)[state // BLOCK, token]
        return jnp.asarray(self.next)[state // BLOCK, state % BLOCK, of_class].astype(jnp.int32)

    def end(self, state: jax.Array) -> jax.Array:
        """What can follow."""
        return jnp.asarray(self.ends)[state // BLOCK, state % BLOCK].astype(jnp.int32)
