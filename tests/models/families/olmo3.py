import json
from dataclasses import replace

from tests.models.families import BASE, Mutant, Variant

YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "attention_factor": 1.2,
}
FIELDS = BASE | {"num_hidden_layers": 5, "sliding_window": 9}


def as_published(folder):
    """As on the hub: one theta, and the scaling that is of full layers alone; the pattern follows."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"], config["layer_types"]
    path.write_text(json.dumps(config | {"rope_theta": 500000, "rope_scaling": YARN}))


def full(config, **changes):
    """Changes the embedding of layers without a window."""
    ropes = zip(config.ropes, config.windows, strict=True)
    return replace(config, ropes=tuple(rope if window else replace(rope, **changes) for rope, window in ropes))


BOTH = {
    "full_attention": YARN | {"rope_theta": 2e4},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
VARIANTS = {
    "olmo3": Variant("Olmo3Config", FIELDS | {"rope_scaling": YARN}),
    "olmo3-published": Variant("Olmo3Config", FIELDS | {"rope_scaling": YARN}, as_published),
    "olmo3-thetas": Variant(
        "Olmo3Config",
        FIELDS
        | {
            "num_hidden_layers": 2,
            "layer_types": ["full_attention", "sliding_attention"],
            "rope_parameters": BOTH,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
}
MUTANTS = {
    "olmo3: window": Mutant(
        "olmo3", lambda config: replace(config, windows=tuple(w and w + 1 for w in config.windows))
    ),
    "olmo3: pattern": Mutant("olmo3", lambda config: replace(config, windows=(9, 9, None, 9, 9))),
    "olmo3: yarn on all layers": Mutant("olmo3", lambda config: replace(config, ropes=(config.ropes[3],) * 5)),
    "olmo3: yarn nowhere": Mutant("olmo3", lambda config: replace(config, ropes=(config.ropes[0],) * 5)),
    "olmo3: attention_factor": Mutant("olmo3", lambda config: full(config, attention_factor=1.0)),
    "olmo3: theta": Mutant("olmo3", lambda config: full(config, theta=1e4)),
    "olmo3: thetas": Mutant("olmo3-thetas", lambda config: full(config, theta=100.0)),
    "olmo3: eps": Mutant("olmo3", lambda config: replace(config, norm_eps=1e-2)),
}
