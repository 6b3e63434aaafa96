from dataclasses import replace

from tests.models.families import BASE, Mutant, Variant, of_ropes

YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
VARIANTS = {
    "ernie4_5": Variant("Ernie4_5Config", BASE | {"head_dim": 16}),
    "ernie4_5-bias-tied": Variant(
        "Ernie4_5Config", BASE | {"use_bias": True, "tie_word_embeddings": True, "rope_parameters": YARN, "head_dim": 8}
    ),
    "ernie4_5-null": Variant("Ernie4_5Config", BASE | {"head_dim": None, "num_key_value_heads": None}),
}
MUTANTS = {
    "ernie4_5: eps": Mutant("ernie4_5", lambda config: replace(config, norm_eps=1e-2)),
    "ernie4_5: activation": Mutant("ernie4_5", lambda config: replace(config, activation="gelu")),
    "ernie4_5: theta": Mutant("ernie4_5", of_ropes(theta=10000.0)),
    "ernie4_5: interleaved": Mutant("ernie4_5", of_ropes(interleaved=False)),
    "ernie4_5: yarn": Mutant("ernie4_5-bias-tied", of_ropes(kind="default")),
}
