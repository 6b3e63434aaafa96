"""MPNet (Song et al., arXiv:2004.09297): RoBERTa's layer, and biases of scores by distance, alike in all layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxinfer.attention import ForwardBatch
from jaxinfer.attention.relative import Relative, distances, t5_buckets
from jaxinfer.layers.linear import Embedding
from jaxinfer.layers.stack import RunLayer
from jaxinfer.models.config import ConfigReader
from jaxinfer.models.encoder import DEFAULTS, Encoder, EncoderConfig, encoder_config, encoder_weights
from jaxinfer.models.encoder import NAMES as BERT
from jaxinfer.models.registry import Architecture
from jaxinfer.models.roberta import classifier

PADDING, BUCKETS, FURTHEST = 1, 32, 128  # whatever config.json says
NAMES = BERT | {
    "relative_bias.": "encoder.relative_attention_bias.",
    ".self_attn.q_proj.": ".attention.attn.q.",
    ".self_attn.k_proj.": ".attention.attn.k.",
    ".self_attn.v_proj.": ".attention.attn.v.",
    ".self_attn.o_proj.": ".attention.attn.o.",
    ".attn_norm.": ".attention.LayerNorm.",
}


@dataclass(frozen=True)
class MPNetConfig(EncoderConfig):
    """MPNet's own field.

    bias_rows: of the table of biases.
    """

    bias_rows: int = BUCKETS


def parse(fields: ConfigReader) -> MPNetConfig:
    """Of more rows than there are buckets the rest is unused."""
    rows = fields.integer("relative_attention_num_buckets", BUCKETS, minimum=BUCKETS)
    fields = fields.with_defaults(**DEFAULTS, vocab_size=30527)
    return encoder_config(fields, MPNetConfig, after_padding=PADDING, bias_rows=rows)


class MPNet(Encoder):
    """With the table, of which each head has a column."""

    def __init__(self, config: MPNetConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype, rngs=rngs)
        size = config.bias_rows, config.num_heads
        self.relative_bias = Embedding(*size, axes=(None, None), dtype=dtype, rngs=rngs)

    def runner(self, batch: ForwardBatch) -> RunLayer[Any]:
        buckets = t5_buckets(distances(FURTHEST + 1), BUCKETS, FURTHEST)
        bias = self.relative_bias(jnp.asarray(buckets)).astype(jnp.float32)
        relative = Relative(bias.T)
        return lambda layer, x, cache, view: (layer(x, {}, view, relative), None)


ARCHITECTURE = Architecture(parse, MPNet, encoder_weights("mpnet.", r"lm_head\..+", names=NAMES), classifier=classifier)
