from dataclasses import replace

from tests.models.families import BASE, BODY, CLASSES, Mutant, Variant
from tests.models.families.bert import THREE, head

VARIANTS = {
    "eurobert": Variant("EuroBertConfig", BASE, auto=BODY),
    "eurobert-words": Variant(
        "EuroBertConfig", BASE | {"head_dim": 12, "mlp_bias": False}, auto="AutoModelForMaskedLM"
    ),
    "eurobert-late": Variant("EuroBertConfig", BASE | THREE | {"attention_bias": True}, auto=CLASSES),
    "eurobert-mean": Variant("EuroBertConfig", BASE | THREE | {"classifier_pooling": "mean"}, auto=CLASSES),
    "eurobert-bos": Variant("EuroBertConfig", BASE | THREE | {"classifier_pooling": "bos"}, auto=CLASSES),
}
MUTANTS = {
    "eurobert: causal": Mutant("eurobert", lambda config: replace(config, causal=True)),
    "eurobert: eps": Mutant("eurobert", lambda config: replace(config, norm_eps=1e-2)),
    "eurobert: late": Mutant("eurobert-late", head(late=False)),
    "eurobert: head's activation": Mutant("eurobert-bos", head(activation="relu")),
}
