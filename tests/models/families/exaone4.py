import json
from dataclasses import replace

from tests.models.families import BASE, Mutant, Variant


def without_types(folder):
    """The pattern says which layers slide."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["layer_types"]
    path.write_text(json.dumps(config))


LAYERS = {"num_hidden_layers": 5, "sliding_window": 9}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e3,
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
VARIANTS = {
    "exaone4": Variant("Exaone4Config", BASE | LAYERS, without_types),
    "exaone4-pattern": Variant(
        "Exaone4Config",
        BASE | {"num_hidden_layers": 4, "sliding_window": 20, "sliding_window_pattern": 3},
        without_types,
    ),
    "exaone4-full": Variant(
        "Exaone4Config",
        BASE
        | {
            "sliding_window": None,
            "layer_types": ["full_attention"] * 2,
            "rope_parameters": LLAMA3,
            "head_dim": 16,
            "tie_word_embeddings": True,
        },
    ),
    "exaone4-no-positions": Variant("Exaone4Config", BASE | {"layer_types": ["full_attention"] * 2}),
}
MUTANTS = {
    "exaone4: window": Mutant(
        "exaone4", lambda config: replace(config, windows=tuple(w and w + 1 for w in config.windows))
    ),
    "exaone4: pattern": Mutant("exaone4", lambda config: replace(config, windows=(9, 9, None, 9, 9))),
    "exaone4: full layers turn": Mutant("exaone4", lambda config: replace(config, ropes=(config.ropes[0],) * 5)),
    "exaone4: no layer turns": Mutant("exaone4-full", lambda config: replace(config, ropes=(None,) * 2)),
    "exaone4: llama3": Mutant(
        "exaone4-full", lambda config: replace(config, ropes=(replace(config.ropes[0], kind="default"),) * 2)
    ),
    "exaone4: eps": Mutant("exaone4", lambda config: replace(config, norm_eps=1e-2)),
    "exaone4: activation": Mutant("exaone4", lambda config: replace(config, activation="gelu")),
}
