from dataclasses import replace

from tests.models.families import BASE, Mutant, Variant, of_ropes

ROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 8.0, "partial_rotary_factor": 0.75}
FACTORS = {"short_factor": [1.0, 1.3, 2.5], "long_factor": [1.5, 4.0, 9.0]}
LONG = BASE | {"original_max_position_embeddings": 256, "rope_parameters": ROPE | FACTORS}
VARIANTS = {
    "phi3": Variant("Phi3Config", BASE | {"rope_theta": 500.0}),
    "phi3-window-tied": Variant(
        "Phi3Config", BASE | {"sliding_window": 9, "tie_word_embeddings": True, "num_key_value_heads": None}
    ),
    "phi3-partial": Variant("Phi3Config", BASE | {"partial_rotary_factor": 0.5}),
    "phi3-longrope": Variant("Phi3Config", LONG),
    "phi3-longrope-factor": Variant(
        "Phi3Config", LONG | {"rope_parameters": ROPE | FACTORS | {"attention_factor": 1.7}, "rope_theta": 300.0}
    ),
}
MUTANTS = {
    "phi3: eps": Mutant("phi3", lambda config: replace(config, norm_eps=1e-2)),
    "phi3: activation": Mutant("phi3", lambda config: replace(config, activation="gelu")),
    "phi3: window": Mutant("phi3-window-tied", lambda config: replace(config, windows=(10, 10))),
    "phi3: partial": Mutant("phi3-partial", of_ropes(dim=8)),
    "phi3: short factors": Mutant("phi3-longrope", of_ropes(short_factors=(1.0, 1.0, 1.0))),
    "phi3: attention factor": Mutant("phi3-longrope", of_ropes(attention_factor=1.0)),
}
