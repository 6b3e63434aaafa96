"""What every model's module is to those who run it, whatever it is for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from jaxinfer.attention import ForwardBatch
from jaxinfer.cache import Cache
from jaxinfer.layers.classifier import Classifier
from jaxinfer.layers.stack import RunLayer, Stream, hidden_states, stack


class Body(nnx.Module):
    """Layers that make hidden states of tokens. Whole texts are encoded without a cache, and classified where there is
    a head for it.

    classifier: that head, where the model has one.
    """

    classifier: Classifier | None = None

    def embed(self, batch: ForwardBatch) -> Stream:
        """The hidden states before the first layer, `[T, D]`, with what else layers take."""
        raise NotImplementedError

    def blocks(self) -> Sequence[Any]:
        """The layers, in the order in which they run."""
        raise NotImplementedError

    def runner(self, batch: ForwardBatch) -> RunLayer[Any]:
        """What runs one of the layers on hidden states."""
        raise NotImplementedError

    def hidden(self, batch: ForwardBatch, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
        """The hidden states after the last layer, `[T, D]`, and the cache with the new keys and values."""
        stream, cache = stack(self.blocks(), self.embed(batch), cache, batch, self.runner(batch))
        return hidden_states(stream), cache

    def finish(self, x: jax.Array) -> jax.Array:
        """Those, `[N, D]`, as heads get them: through the final norm, and what else comes after the last layer."""
        raise NotImplementedError

    def encode(self, batch: ForwardBatch) -> jax.Array:
        """The finished hidden states of all tokens of whole texts, `[T, D]`."""
        return self.finish(self.hidden(batch, None)[0])

    def classify(self, x: jax.Array, batch: ForwardBatch) -> jax.Array:
        """Logits float32 `[R, C]` of each text, of its `encode`d tokens."""
        assert self.classifier is not None, "the model has no classes"
        return self.classifier(x, batch)

    def classify_tokens(self, x: jax.Array) -> jax.Array:
        """Logits float32 `[T, C]` of each of them."""
        assert self.classifier is not None, "the model has no classes"
        return self.classifier.logits(x)
