import json
from dataclasses import replace

from tests.models.families import BODY, CLASSES, Mutant, Variant
from tests.models.families.bert import FIELDS, THREE, head

FULL, SLIDING = "full_attention", "sliding_attention"
SHORT = FIELDS | {"num_hidden_layers": 4, "local_attention": 10}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}
ROPES = {FULL: {"rope_type": "default", "rope_theta": 900.0}, SLIDING: LINEAR}
TYPED = {"rope_parameters": ROPES, "layer_types": [SLIDING, FULL], "num_hidden_layers": 2, "local_attention": 7}
BIASED = {"attention_bias": True, "mlp_bias": True, "norm_bias": True, "classifier_bias": True}


def old_spelling(folder):
    """What transformers 4 wrote."""
    path = folder / "config.json"
    data = json.loads(path.read_text())
    ropes = data.pop("rope_parameters")
    data |= {"global_rope_theta": ropes[FULL]["rope_theta"], "local_rope_theta": ropes[SLIDING]["rope_theta"]}
    del data["layer_types"]
    path.write_text(json.dumps(data | {"global_attn_every_n_layers": 3, "sliding_window": 5}))


VARIANTS = {
    "modernbert": Variant("ModernBertConfig", SHORT, auto=BODY),
    "modernbert-old": Variant("ModernBertConfig", SHORT, old_spelling, auto="AutoModelForMaskedLM"),
    "modernbert-typed-biased-silu": Variant(
        "ModernBertConfig", SHORT | TYPED | BIASED | {"hidden_activation": "silu"}, auto=BODY
    ),
    "modernbert-classes": Variant("ModernBertConfig", SHORT | THREE, auto=CLASSES),
    "modernbert-mean": Variant(
        "ModernBertConfig",
        SHORT | THREE | BIASED | {"classifier_pooling": "mean", "classifier_activation": "relu", "norm_eps": 1e-3},
        auto=CLASSES,
    ),
}


def windows(change):
    return lambda config: replace(config, windows=tuple(w and w + change for w in config.windows))


MUTANTS = {
    "modernbert: window": Mutant("modernbert", windows(1)),
    "modernbert: window's end": Mutant("modernbert", windows(-1)),
    "modernbert: which layers slide": Mutant("modernbert", lambda c: replace(c, windows=c.windows[1:] + c.windows[:1])),
    "modernbert: ropes of the types": Mutant("modernbert-typed-biased-silu", lambda c: replace(c, ropes=c.ropes[::-1])),
    "modernbert: eps": Mutant("modernbert", lambda config: replace(config, norm_eps=1e-2)),
    "modernbert: activation": Mutant("modernbert", lambda config: replace(config, activation="gelu_new")),
    "modernbert: pooling": Mutant("modernbert-mean", head(pooling="cls")),
    "modernbert: head's activation": Mutant("modernbert-classes", head(activation="gelu_new")),
    "modernbert: head's eps": Mutant("modernbert-classes", head(norm_eps=1e-2)),
}
