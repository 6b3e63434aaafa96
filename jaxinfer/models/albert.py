"""ALBERT (Lan et al., arXiv:1909.11942): few layers, each of which runs many times, behind smaller embeddings."""

from __future__ import annotations

import re
from dataclasses import replace

from jaxinfer.models.config import MAX_LAYERS, ConfigReader, ModelConfig
from jaxinfer.models.encoder import DEFAULTS as BASE
from jaxinfer.models.encoder import NAMES as BERT
from jaxinfer.models.encoder import Encoder, EncoderConfig, encoder_config, encoder_weights
from jaxinfer.models.registry import Architecture
from jaxinfer.models.sources import Source
from jaxinfer.models.tasks import of_pooler
from jaxinfer.models.weights import ParamMapping

LARGE = {"hidden_size": 4096, "num_attention_heads": 64, "intermediate_size": 16384, "vocab_size": 30000}
DEFAULTS = BASE | LARGE
NAMES = BERT | {
    "project.": "encoder.embedding_hidden_mapping_in.",
    "layers.": "encoder.albert_layer_groups.",
    ".self_attn.q_proj.": ".attention.query.",
    ".self_attn.k_proj.": ".attention.key.",
    ".self_attn.v_proj.": ".attention.value.",
    ".self_attn.o_proj.": ".attention.dense.",
    ".attn_norm.": ".attention.LayerNorm.",
    ".mlp.up_proj.": ".ffn.",
    ".mlp.down_proj.": ".ffn_output.",
    ".mlp_norm.": ".full_layer_layer_norm.",
    ".inside.": ".albert_layers.",
}


def parse(fields: ConfigReader) -> EncoderConfig:
    """Of `num_hidden_groups` groups of layers each runs as often as the next one, one after the other."""
    fields.refuse("position_embedding_type", "absolute")
    fields = fields.with_defaults(**DEFAULTS)
    config = encoder_config(
        fields,
        EncoderConfig,
        activation="gelu_new",
        token_types=fields.integer("type_vocab_size", 2),
        embedding_size=fields.integer("embedding_size", 128),
        projected=True,
    )
    runs = config.num_layers
    groups = fields.integer("num_hidden_groups", 1, maximum=runs)
    inside = fields.integer("inner_group_num", 1, maximum=MAX_LAYERS // runs)
    order = tuple(int(i / (runs / groups)) * inside + j for i in range(runs) for j in range(inside))
    own = (None,) * (groups * inside)
    return replace(config, order=order, ropes=own, windows=own)


def weights(config: ModelConfig) -> ParamMapping:
    """Layers are numbered by group, and in it."""
    assert isinstance(config, EncoderConfig)
    mapping = encoder_weights("albert.", r"(predictions|sop_classifier)\..+", names=NAMES)(config)
    inside = len(config.order) // config.num_layers

    def source(name: str) -> Source:
        def of_group(layer: re.Match[str]) -> str:
            return "layers.{}.inside.{}.".format(*divmod(int(layer[1]), inside))

        return mapping.source(re.sub(r"^layers\.(\d+)\.", of_group, name))

    return replace(mapping, source=source)


ARCHITECTURE = Architecture(parse, Encoder, weights, classifier=of_pooler("albert.pooler"))
