from dataclasses import replace

from tests.models.families import BODY, CLASSES, Mutant, Variant
from tests.models.families.bert import FIELDS, THREE

V3 = FIELDS | {
    "relative_attention": True,
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": "p2c|c2p",
    "position_biased_input": False,
    "max_position_embeddings": 32,  # texts are longer
}
OWN = {"share_att_key": False, "norm_rel_ebd": "none", "position_buckets": -1, "max_relative_positions": 12}
VARIANTS = {
    "deberta-v2": Variant("DebertaV2Config", V3, auto=BODY),
    "deberta-v2-own": Variant("DebertaV2Config", V3 | OWN, auto=BODY),
    "deberta-v2-c2p": Variant(
        "DebertaV2Config", V3 | OWN | {"pos_att_type": ["c2p"], "position_buckets": 6}, auto=BODY
    ),
    "deberta-v2-p2c": Variant("DebertaV2Config", V3 | {"pos_att_type": ["p2c"]}, auto="AutoModelForMaskedLM"),
    "deberta-v2-plain": Variant("DebertaV2Config", FIELDS | {"type_vocab_size": 2}, auto=BODY),
    "deberta-v2-classes": Variant("DebertaV2Config", V3 | THREE | {"pooler_hidden_act": "silu"}, auto=CLASSES),
}
MUTANTS = {
    "deberta-v2: content to position": Mutant("deberta-v2", lambda config: replace(config, terms=("p2c",))),
    "deberta-v2: position to content": Mutant("deberta-v2", lambda config: replace(config, terms=("c2p",))),
    "deberta-v2: buckets' end": Mutant("deberta-v2", lambda config: replace(config, furthest=24)),
    "deberta-v2: norm of distances": Mutant("deberta-v2", lambda config: replace(config, distance_norm=False)),
    "deberta-v2: scale": Mutant("deberta-v2", lambda config: replace(config, scale=8**-0.5)),
}
