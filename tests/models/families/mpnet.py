from dataclasses import replace

from tests.models.families import BODY, CLASSES, Mutant, Variant
from tests.models.families.bert import FIELDS, THREE

VARIANTS = {
    "mpnet": Variant("MPNetConfig", FIELDS, auto=BODY),
    "mpnet-words": Variant("MPNetConfig", FIELDS | {"relative_attention_num_buckets": 40}, auto="AutoModelForMaskedLM"),
    "mpnet-classes": Variant("MPNetConfig", FIELDS | THREE, auto=CLASSES),
}
MUTANTS = {
    "mpnet: places": Mutant("mpnet", lambda config: replace(config, padding_id=None)),
    "mpnet: scale": Mutant("mpnet", lambda config: replace(config, scale=1.0)),
}
