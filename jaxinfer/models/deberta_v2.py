"""DeBERTa v2 and v3 (He et al., arXiv:2006.03654, arXiv:2111.09543): BERT's layer, and scores of contents with
distances, which have embeddings, projected in each layer as tokens are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxinfer.attention import ForwardBatch
from jaxinfer.attention.relative import Relative, deberta_buckets, distances
from jaxinfer.layers.classifier_config import ClassifierConfig
from jaxinfer.layers.linear import Embedding, Linear
from jaxinfer.layers.mlp import ACTIVATIONS
from jaxinfer.layers.stack import RunLayer
from jaxinfer.models.config import ConfigReader, ModelConfig
from jaxinfer.models.encoder import NAMES as BERT
from jaxinfer.models.encoder import Encoder, EncoderConfig, EncoderLayer, encoder_config, encoder_weights, layer_norm
from jaxinfer.models.registry import Architecture
from jaxinfer.models.tasks import num_labels
from jaxinfer.models.weights import ParamMapping

DEFAULTS = {
    "vocab_size": 128100,
    "hidden_size": 1536,
    "num_hidden_layers": 24,
    "num_attention_heads": 24,
    "intermediate_size": 6144,
    "max_position_embeddings": 512,
}
TO_POSITION, TO_CONTENT = "c2p", "p2c"
NAMES = BERT | {
    "distances.": "encoder.rel_embeddings.",
    "distance_norm.": "encoder.LayerNorm.",
    ".self_attn.q_proj.": ".attention.self.query_proj.",
    ".self_attn.k_proj.": ".attention.self.key_proj.",
    ".self_attn.v_proj.": ".attention.self.value_proj.",
    ".position_key.": ".attention.self.pos_key_proj.",
    ".position_query.": ".attention.self.pos_query_proj.",
}


@dataclass(frozen=True)
class DebertaConfig(EncoderConfig):
    """DeBERTa's own fields.

    terms: of scores, besides contents with contents: TO_POSITION, TO_CONTENT.
    shared: distances are projected as contents are, and not by matrices of their own.
    buckets: of distances to each side, where the far ones share some; 0: each has its own.
    furthest: the distance from which on all are one.
    distance_norm: their embeddings are normed.
    """

    terms: tuple[str, ...] = ()
    shared: bool = False
    buckets: int = 0
    furthest: int = 0
    distance_norm: bool = False


def parse(fields: ConfigReader) -> DebertaConfig:
    """Terms count in the scale even where they are not computed."""
    fields = fields.with_defaults(**DEFAULTS)
    fields.refuse("conv_kernel_size", 0)
    for name in ("embedding_size", "pooler_hidden_size"):
        fields.refuse(name, fields.integer("hidden_size"))
    terms = fields.data.get("pos_att_type")
    if isinstance(terms, str):
        terms = [part.strip() for part in terms.lower().split("|")]
    terms = [] if terms is None else terms
    if not isinstance(terms, list) or any(term not in (TO_POSITION, TO_CONTENT) for term in terms):
        raise fields.error("pos_att_type", f"it must be a list of {TO_POSITION} and {TO_CONTENT}")
    norms = fields.choice("norm_rel_ebd", "none", ("none", "layer_norm"))
    furthest = fields.data.get("max_relative_positions", -1)
    context = fields.integer("max_position_embeddings")
    furthest = context if furthest in (None, -1, 0) else fields.integer("max_relative_positions")
    buckets = fields.integer("position_buckets", -1, minimum=-1)
    head_dim = fields.integer("hidden_size") // fields.integer("num_attention_heads")
    fields.refuse("attention_head_size", head_dim)
    return encoder_config(
        fields,
        DebertaConfig,
        eps=1e-7,
        scale=(max(head_dim, 1) * (1 + len(set(terms)))) ** -0.5,
        learned=fields.boolean("position_biased_input", True),
        token_types=fields.integer("type_vocab_size", 0, minimum=0),
        terms=tuple(terms) if fields.boolean("relative_attention", False) else (),
        shared=fields.boolean("share_att_key", False),
        buckets=max(buckets, 0),
        furthest=furthest,
        distance_norm=norms == "layer_norm",
    )


def classifier(fields: ConfigReader, config: ModelConfig) -> ClassifierConfig:
    """Of the pooler's vector."""
    activation = fields.choice("pooler_hidden_act", "gelu", tuple(ACTIVATIONS))
    return ClassifierConfig(num_labels(fields), activation=activation, dense="pooler.dense")


class DebertaLayer(EncoderLayer):
    """With what distances add to scores."""

    def __init__(self, config: DebertaConfig, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        super().__init__(config, layer, dtype=dtype, rngs=rngs)

        def own(term: str) -> Linear | None:
            if config.shared or term not in config.terms:
                return None
            size = config.hidden_size, config.num_heads * config.head_dim
            return Linear(*size, axes=("heads", "embed"), bias=True, dtype=dtype, rngs=rngs)

        self.position_key, self.position_query = own(TO_POSITION), own(TO_CONTENT)
        self.terms, self.heads = config.terms, config.num_heads

    def relative(self, table: jax.Array, rows: jax.Array) -> Relative:
        """Of embeddings of distances `[2 * span, D]`, of which `rows` are those of all distances."""

        def of_heads(term: str, own: Linear | None, contents: Linear) -> jax.Array | None:
            if term not in self.terms:
                return None
            projected = (contents if own is None else own)(table)
            return projected.reshape(table.shape[0], self.heads, -1)[rows].transpose(1, 0, 2)

        keys = of_heads(TO_POSITION, self.position_key, self.self_attn.k_proj)
        return Relative(keys=keys, queries=of_heads(TO_CONTENT, self.position_query, self.self_attn.q_proj))


class Deberta(Encoder):
    """With the embeddings of distances."""

    layer = DebertaLayer
    config: DebertaConfig

    def __init__(self, config: DebertaConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype, rngs=rngs)
        if config.terms:
            rows = 2 * (config.buckets or config.furthest)
            self.distances = Embedding(rows, config.hidden_size, axes=(None, "embed"), dtype=dtype, rngs=rngs)
            self.distance_norm = layer_norm(config, dtype) if config.distance_norm else None

    def runner(self, batch: ForwardBatch) -> RunLayer[Any]:
        if not self.config.terms:
            return super().runner(batch)
        buckets, furthest = self.config.buckets, self.config.furthest
        reach = min(furthest + 1, batch.tokens.shape[0])
        rows = jnp.asarray(deberta_buckets(distances(reach), buckets, furthest))
        table = self.distances(jnp.arange(2 * (buckets or furthest), dtype=jnp.int32), batch.mesh)
        table = table if self.distance_norm is None else self.distance_norm(table)
        return lambda layer, x, cache, view: (layer(x, {}, view, layer.relative(table, rows)), None)


def weights(config: ModelConfig) -> ParamMapping:
    """Checkpoints carry positions and distances that some have no use for."""
    heads = r"(cls|lm_predictions|mask_predictions)\..+"
    mapping = encoder_weights("deberta.", heads, names=NAMES)(config)
    unused = r"embeddings\.position_embeddings\..+", r"encoder\.(rel_embeddings|LayerNorm)\..+"
    return replace(mapping, ignored=(*mapping.ignored, *unused))


ARCHITECTURE = Architecture(parse, Deberta, weights, classifier=classifier)
