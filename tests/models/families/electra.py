from dataclasses import replace

from tests.models.families import BODY, CLASSES, Mutant, Variant
from tests.models.families.bert import FIELDS, THREE, head

VARIANTS = {
    "electra": Variant("ElectraConfig", FIELDS | {"embedding_size": 24}, auto=BODY),
    "electra-alike": Variant("ElectraConfig", FIELDS | {"embedding_size": 32}, auto="AutoModelForPreTraining"),
    "electra-words": Variant("ElectraConfig", FIELDS | {"embedding_size": 24}, auto="AutoModelForMaskedLM"),
    "electra-classes": Variant("ElectraConfig", FIELDS | THREE | {"embedding_size": 24}, auto=CLASSES),
}
MUTANTS = {
    "electra: eps": Mutant("electra", lambda config: replace(config, norm_eps=1e-2)),
    "electra: head's activation": Mutant("electra-classes", head(activation="tanh")),
}
