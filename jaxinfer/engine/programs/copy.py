"""Copies of pages and states, from one place to another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from jaxinfer.engine.programs.base import EngineShapes, Function, Program
from jaxinfer.engine.programs.state import State
from jaxinfer.models.model import Params
from jaxinfer.sharding import ROWS


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Places:
    """Of one kind: pages of a pool, or slots.

    source, target: i32[N], from where to where.
    count: i32[1], how many of them.
    """

    source: jax.Array | np.ndarray
    target: jax.Array | np.ndarray
    count: jax.Array | np.ndarray

    @classmethod
    def of(cls, pairs: Sequence[tuple[int, int]], size: int) -> Places:
        """These, of at most `size`."""
        source, target = np.zeros(size, np.int32), np.zeros(size, np.int32)
        if pairs:
            source[: len(pairs)], target[: len(pairs)] = zip(*pairs, strict=True)
        return cls(source, target, np.array([len(pairs)], np.int32))


class Copy(Program[EngineShapes]):
    """Copies up to `size` pages of each pool, and as many states, one after the other: one may read what another has
    written."""

    kind = "copy"
    changes = ("cache",)
    weights = ()
    result = None

    @property
    def inputs(self) -> tuple[object, ...]:
        ints, kinds = self.shapes.ints, len(self.shapes.layout.pools) + 1
        return ((Places(ints(self.size), ints(self.size), ints(1)),) * kinds,)

    def function(self) -> Function:
        sizes = [pool.size for pool in self.shapes.layout.pools]

        def copy(params: Params, state: State, read: State, kinds: tuple[Places, ...]) -> tuple[None, State]:
            cache: list[Any] = []
            for size, places in zip([*sizes, None], kinds, strict=True):
                start = len(cache)
                layers = state.cache[start : None if size is None else start + size]
                cache += _copied(layers, places)
            return None, State(tuple(cache))

        return self.over_rows(copy, (PartitionSpec(ROWS),), PartitionSpec())


def _copied(layers: Any, places: Places) -> Any:
    source, target = map(jax.numpy.asarray, (places.source, places.target))

    def one(i: jax.Array, layers: Any) -> Any:
        return jax.tree.map(
            lambda x: lax.dynamic_update_slice_in_dim(x, lax.dynamic_slice_in_dim(x, source[i], 1), target[i], axis=0),
            layers,
        )

    return lax.fori_loop(0, places.count[0], one, layers)
