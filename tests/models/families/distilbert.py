from dataclasses import replace

from tests.models.families import BODY, CLASSES, VOCAB, Mutant, Variant
from tests.models.families.bert import THREE, head

FIELDS = {
    "vocab_size": VOCAB,
    "dim": 32,
    "hidden_dim": 48,
    "n_layers": 2,
    "n_heads": 4,
    "max_position_embeddings": 256,
}
VARIANTS = {
    "distilbert": Variant("DistilBertConfig", FIELDS | {"sinusoidal_pos_embds": True}, auto=BODY),
    "distilbert-words": Variant("DistilBertConfig", FIELDS | {"activation": "relu"}, auto="AutoModelForMaskedLM"),
    "distilbert-classes": Variant("DistilBertConfig", FIELDS | THREE, auto=CLASSES),
}
MUTANTS = {
    "distilbert: eps": Mutant("distilbert", lambda config: replace(config, norm_eps=1e-2)),
    "distilbert: activation": Mutant("distilbert", lambda config: replace(config, activation="gelu_new")),
    "distilbert: scale": Mutant("distilbert", lambda config: replace(config, scale=1.0)),
    "distilbert: head's activation": Mutant("distilbert-classes", head(activation="tanh")),
}
