from dataclasses import replace

from tests.models.families import BASE, Mutant, Variant

DEEP = BASE | {"num_hidden_layers": 4}
SLIDING = DEEP | {"use_sliding_window": True, "sliding_window": 16}
TYPES = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
VARIANTS = {
    "smollm3": Variant("SmolLM3Config", DEEP),
    "smollm3-interval-bias-tied": Variant(
        "SmolLM3Config",
        BASE
        | {"no_rope_layer_interval": 2, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
        | {"num_key_value_heads": None},
    ),
    "smollm3-window": Variant("SmolLM3Config", SLIDING | {"no_rope_layers": [0, 1, 1, 0, 1]}),
    "smollm3-layer_types": Variant(
        "SmolLM3Config", SLIDING | {"layer_types": TYPES, "rope_theta": 1e4, "hidden_act": "gelu"}
    ),
    "smollm3-window-unused": Variant("SmolLM3Config", BASE | {"sliding_window": 16, "no_rope_layers": [1, 0]}),
    "smollm3-yarn": Variant(
        "SmolLM3Config",
        BASE
        | {
            "max_position_embeddings": 128,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
}
MUTANTS = {
    "smollm3: eps": Mutant("smollm3", lambda config: replace(config, norm_eps=1e-2)),
    "smollm3: activation": Mutant("smollm3", lambda config: replace(config, activation="gelu")),
    "smollm3: all layers turn": Mutant("smollm3", lambda config: replace(config, ropes=config.ropes[:1] * 4)),
    "smollm3: none turns": Mutant("smollm3", lambda config: replace(config, ropes=(None,) * 4)),
    "smollm3: theta": Mutant(
        "smollm3-yarn", lambda config: replace(config, ropes=(replace(config.ropes[0], theta=1e3),) * 2)
    ),
    "smollm3: no interval": Mutant(
        "smollm3-interval-bias-tied", lambda config: replace(config, ropes=config.ropes[:1] * 2)
    ),
    "smollm3: window + 1": Mutant("smollm3-window", lambda config: replace(config, windows=(17, None, None, 17))),
    "smollm3: no window": Mutant("smollm3-window", lambda config: replace(config, windows=(None,) * 4)),
    "smollm3: turning layers slide": Mutant(
        "smollm3-layer_types", lambda config: replace(config, windows=(None, None, None, 16))
    ),
    "smollm3: yarn": Mutant(
        "smollm3-yarn", lambda config: replace(config, ropes=(replace(config.ropes[0], kind="default"),) * 2)
    ),
}
