from dataclasses import replace

from tests.models.families import BASE, Mutant, Variant

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
VARIANTS = {
    "arcee": Variant("ArceeConfig", BASE | {"head_dim": 16}),
    "arcee-bias-tied": Variant(
        "ArceeConfig",
        BASE
        | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "num_key_value_heads": None}
        | {"hidden_act": "silu"},
    ),
    "arcee-yarn": Variant("ArceeConfig", BASE | {"max_position_embeddings": 128, "rope_parameters": YARN}),
}
MUTANTS = {
    "arcee: eps": Mutant("arcee", lambda config: replace(config, norm_eps=1e-2)),
    "arcee: activation": Mutant("arcee", lambda config: replace(config, activation="relu")),
    "arcee: scale": Mutant("arcee", lambda config: replace(config, scale=8**-0.5)),
    "arcee: yarn": Mutant(
        "arcee-yarn", lambda config: replace(config, ropes=(replace(config.ropes[0], kind="default"),) * 2)
    ),
}
