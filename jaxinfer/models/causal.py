"""What every language model module is to those who run it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from jaxinfer.attention import ForwardBatch
from jaxinfer.cache import Cache, KVCacheSpec
from jaxinfer.models.body import Body

# Of a layer: what is multiplied channel by channel with what it feeds (norms; linears, whose outputs reach others with
# no more than sums over tokens and factors of other sources between), and the linears that take it.
SmoothingPairs = tuple[tuple[str, tuple[str, ...]], ...]


class CausalLM(Body):
    """A body, which is run on all tokens of a batch, and an output head, for those whose logits are wanted."""

    def cache_specs(self) -> tuple[KVCacheSpec | None, ...]:
        """What each layer keeps of a sequence: the `cache_spec` of one of its modules; None: nothing."""

        def specs(block: Any) -> Iterator[KVCacheSpec]:
            modules = (module for _, module in nnx.iter_modules(block))
            return (module.cache_spec for module in modules if hasattr(module, "cache_spec"))

        return tuple(next(specs(block), None) for block in self.blocks())

    def logits(self, x: jax.Array, mesh: Mesh | None = None) -> jax.Array:
        """Logits float32 `[N, V]` of some hidden states, `[N, D]`; mesh: as in ForwardBatch."""
        raise NotImplementedError

    def __call__(self, batch: ForwardBatch, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
        """Logits float32 `[T, V]` of all tokens, and the new cache."""
        x, cache = self.hidden(batch, cache)
        return self.logits(x), cache
