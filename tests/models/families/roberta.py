from dataclasses import replace

from tests.models.families import BODY, CLASSES, Mutant, Variant
from tests.models.families.bert import FIELDS, THREE, head

VARIANTS = {
    "roberta": Variant("RobertaConfig", FIELDS | {"pad_token_id": 9}, auto=BODY),
    "roberta-classes": Variant(
        "RobertaConfig", FIELDS | THREE | {"pad_token_id": 1, "type_vocab_size": 1}, auto=CLASSES
    ),
    "xlm-roberta-words": Variant("XLMRobertaConfig", FIELDS | {"pad_token_id": 1}, auto="AutoModelForMaskedLM"),
    "xlm-roberta-classes": Variant("XLMRobertaConfig", FIELDS | THREE | {"pad_token_id": 1}, auto=CLASSES),
    "camembert": Variant("CamembertConfig", FIELDS | {"pad_token_id": 1}, auto=BODY),
    "camembert-classes": Variant("CamembertConfig", FIELDS | THREE | {"pad_token_id": 1}, auto=CLASSES),
}
MUTANTS = {
    "roberta: places": Mutant("roberta", lambda config: replace(config, padding_id=None)),
    "roberta: padding": Mutant("roberta", lambda config: replace(config, padding_id=8)),
    "roberta: head's activation": Mutant("roberta-classes", head(activation="gelu")),
}
