from dataclasses import replace

from tests.models.families import BODY, CLASSES, Mutant, Variant
from tests.models.families.bert import FIELDS, THREE, head

WIDTH = {"embedding_size": 24, "num_hidden_layers": 3}
GROUPS = {"embedding_size": 32, "num_hidden_layers": 5, "num_hidden_groups": 2, "inner_group_num": 2}
VARIANTS = {
    "albert": Variant("AlbertConfig", FIELDS | WIDTH, auto=BODY),
    "albert-groups": Variant("AlbertConfig", FIELDS | GROUPS | {"hidden_act": "gelu"}, auto="AutoModelForMaskedLM"),
    "albert-pretraining": Variant("AlbertConfig", FIELDS | WIDTH, auto="AutoModelForPreTraining"),
    "albert-classes": Variant("AlbertConfig", FIELDS | THREE | WIDTH, auto=CLASSES),
}
MUTANTS = {
    "albert: activation": Mutant("albert", lambda config: replace(config, activation="gelu")),
    "albert: runs": Mutant("albert", lambda config: replace(config, order=(0,) * 4)),
    "albert: order": Mutant("albert-groups", lambda config: replace(config, order=(0, 1, 0, 1, 2, 3, 2, 3, 2, 3))),
    "albert: pooler's activation": Mutant("albert-classes", head(activation="gelu")),
}
