"""Tables of vectors of tokens, whose mean is a text's: Model2Vec (https://github.com/MinishLab/model2vec), and
StaticEmbedding of sentence-transformers. No token sees another."""

from __future__ import annotations

import jax
from flax import nnx
from jax.typing import DTypeLike

from jaxinfer.attention import ForwardBatch
from jaxinfer.layers.linear import Embedding
from jaxinfer.models.body import Body
from jaxinfer.models.config import ConfigReader, ModelConfig
from jaxinfer.models.registry import Architecture
from jaxinfer.models.weights import ParamMapping

MAX_LENGTH = 2**17  # of a text; nothing but memory limits it


class Table(Body):
    """It is on every device."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.vectors = Embedding(config.vocab_size, config.hidden_size, axes=(None, None), dtype=dtype, rngs=rngs)

    def encode(self, batch: ForwardBatch) -> jax.Array:
        return self.vectors(batch.tokens, batch.mesh)


def parse(fields: ConfigReader) -> ModelConfig:
    """Of what `static_config` says."""
    size = fields.integer("hidden_size")
    return ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=size,
        num_layers=0,
        num_heads=1,
        num_kv_heads=1,
        head_dim=size,
        max_context=MAX_LENGTH,
        tie_word_embeddings=False,
        causal=False,
    )


ARCHITECTURE = Architecture(parse, Table, lambda _: ParamMapping(prefix=""))
