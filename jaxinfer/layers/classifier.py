"""The head of models that give each text, or pair of texts, the logits of classes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxinfer.attention import ForwardBatch
from jaxinfer.layers.classifier_config import LAST_BUT_PADDING, ClassifierConfig
from jaxinfer.layers.linear import Linear, head_logits
from jaxinfer.layers.mlp import ACTIVATIONS
from jaxinfer.layers.norm import LayerNorm
from jaxinfer.layers.pooling import pool


class Classifier(nnx.Module):
    """Of a configuration. On every device all of it: it is small, and outside of layers nothing is gathered."""

    def __init__(self, config: ClassifierConfig, features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        def linear(out: int, bias: bool) -> Linear:
            return Linear(features, out, axes=(None, None), bias=bias, dtype=dtype, rngs=rngs)

        self.dense = linear(features, config.dense_bias) if config.dense else None
        self.norm = (
            LayerNorm(features, eps=config.norm_eps, dtype=dtype, axes=(None,), bias=config.norm_bias)
            if config.norm
            else None
        )
        self.out = linear(len(config.rows) or config.num_labels, config.out_bias)
        self.config, self.dtype = config, jnp.dtype(dtype)

    def __call__(self, x: jax.Array, batch: ForwardBatch) -> jax.Array:
        """Logits float32 `[R, num_labels]` of hidden states `[T, D]`."""
        kind = self.config.pooling
        if self.config.late:
            return pool(self.logits(x), batch, (kind,))
        if kind == LAST_BUT_PADDING:
            return self.logits(x[self._last(batch)])
        return self.logits(pool(x, batch, (kind,)).astype(self.dtype))

    def logits(self, x: jax.Array) -> jax.Array:
        """Those float32 `[N, num_labels]` of hidden states `[N, D]`, each by itself."""
        if self.dense is not None:
            x = ACTIVATIONS[self.config.activation](self.dense(x))
        if self.norm is not None:
            x = self.norm(x)
        logits = head_logits(x, self.out, None)
        return logits[:, 1:] - logits[:, :1] if self.config.difference else logits

    def _last(self, batch: ForwardBatch) -> jax.Array:
        """Each row's last token that is not padding, or its first, by their numbers in the stream."""
        starts = batch.cu_q_lens[:-1]
        real = batch.live if self.config.padding_id is None else batch.live & (batch.tokens != self.config.padding_id)
        place = jnp.where(real, batch.positions, 0)
        last = jax.ops.segment_max(place, batch.segment_ids, starts.shape[0])
        return jnp.clip(starts + jnp.maximum(last, 0), 0, batch.tokens.shape[0] - 1)
