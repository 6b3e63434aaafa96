from dataclasses import replace

from tests.models.families import BASE, Mutant, Variant

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
VARIANTS = {
    "stablelm": Variant("StableLmConfig", BASE),
    "stablelm-bias-tied": Variant(
        "StableLmConfig",
        BASE
        | {"use_qkv_bias": True, "tie_word_embeddings": True, "partial_rotary_factor": 0.75, "hidden_act": "gelu"}
        | {"num_key_value_heads": 4, "rope_theta": 1e3},
    ),
    "stablelm-parallel-qk_layernorm": Variant(
        "StableLmConfig", BASE | {"use_parallel_residual": True, "qk_layernorm": True}
    ),
    "stablelm-qk_layernorm-yarn": Variant(
        "StableLmConfig",
        BASE
        | {"qk_layernorm": True, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128}
        | {"partial_rotary_factor": 0.5, "rope_parameters": YARN},
    ),
}
PARALLEL = "stablelm-parallel-qk_layernorm"
MUTANTS = {
    "stablelm: eps": Mutant("stablelm", lambda config: replace(config, norm_eps=1e-2)),
    "stablelm: eps of heads' norms": Mutant(PARALLEL, lambda config: replace(config, norm_eps=1e-2)),
    "stablelm: activation": Mutant("stablelm", lambda config: replace(config, activation="gelu")),
    "stablelm: all of a head turns": Mutant(
        "stablelm", lambda config: replace(config, ropes=(replace(config.ropes[0], dim=8),) * 2)
    ),
    "stablelm: less of a head turns": Mutant(
        "stablelm-bias-tied", lambda config: replace(config, ropes=(replace(config.ropes[0], dim=4),) * 2)
    ),
    "stablelm: theta": Mutant(
        "stablelm-bias-tied", lambda config: replace(config, ropes=(replace(config.ropes[0], theta=1e4),) * 2)
    ),
    "stablelm: interleaved": Mutant(
        "stablelm-bias-tied", lambda config: replace(config, ropes=(replace(config.ropes[0], interleaved=True),) * 2)
    ),
    "stablelm: yarn": Mutant(
        "stablelm-qk_layernorm-yarn",
        lambda config: replace(config, ropes=(replace(config.ropes[0], kind="default"),) * 2),
    ),
}
