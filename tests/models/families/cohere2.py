import json
from dataclasses import replace

from tests.models.families import BASE, Mutant, Variant


def as_published(folder):
    """As on the hub: a pattern in place of the layers' types."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["layer_types"]
    path.write_text(json.dumps(config | {"sliding_window_pattern": 3}))


FIELDS = BASE | {"num_hidden_layers": 5, "sliding_window": 9, "tie_word_embeddings": True}
TYPES = ["full_attention", "sliding_attention"]
VARIANTS = {
    "cohere2": Variant("Cohere2Config", FIELDS),
    "cohere2-published": Variant("Cohere2Config", FIELDS | {"sliding_window_pattern": 3}, as_published),
    "cohere2-bias": Variant(
        "Cohere2Config", BASE | {"sliding_window": 20, "layer_types": TYPES, "attention_bias": True, "logit_scale": 0.5}
    ),
}
MUTANTS = {
    "cohere2: window": Mutant(
        "cohere2", lambda config: replace(config, windows=tuple(w and w + 1 for w in config.windows))
    ),
    "cohere2: pattern": Mutant("cohere2", lambda config: replace(config, windows=(9, 9, None, 9, 9))),
    "cohere2: full layers turn": Mutant("cohere2", lambda config: replace(config, ropes=(config.ropes[0],) * 5)),
    "cohere2: no layer turns": Mutant("cohere2", lambda config: replace(config, ropes=(None,) * 5)),
    "cohere2: halves turn": Mutant(
        "cohere2",
        lambda config: replace(config, ropes=tuple(r and replace(r, interleaved=False) for r in config.ropes)),
    ),
    "cohere2: logit_scale": Mutant("cohere2", lambda config: replace(config, logit_scale=1.0)),
    "cohere2: eps": Mutant("cohere2", lambda config: replace(config, norm_eps=1e-2)),
}
