"""What every language model module is to those who run it."""

from __future__ import annotations

import jax
from flax import nnx
from jax.sharding import Mesh

from jaxinfer.attention import Batch
from jaxinfer.cache import Cache


class CausalLM(nnx.Module):
    """A body, which is run on all tokens of a batch, and an output head, for those whose logits are wanted."""

    def hidden(self, batch: Batch, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
        """The stream after the last layer, `[T, D]`, and the cache with the new keys and values."""
        raise NotImplementedError

    def logits(self, x: jax.Array, mesh: Mesh | None = None) -> jax.Array:
        """Logits float32 `[N, V]` of some of the stream, `[N, D]`; mesh: as in Batch."""
        raise NotImplementedError

    def __call__(self, batch: Batch, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
        """Logits float32 `[N, V]` of the tokens in `batch.logits_at`, and the new cache."""
        x, cache = self.hidden(batch, cache)
        return self.logits(x[batch.logits_at]), cache
