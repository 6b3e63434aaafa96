from dataclasses import replace

from tests.models.families import BASE, Mutant, Variant

VARIANTS = {
    "seed_oss": Variant("SeedOssConfig", BASE | {"head_dim": 16}),
    "seed_oss-null-tied": Variant(
        "SeedOssConfig", BASE | {"head_dim": None, "num_key_value_heads": None, "tie_word_embeddings": True}
    ),
    "seed_oss-out_bias": Variant(
        "SeedOssConfig", BASE | {"head_dim": 16, "attention_out_bias": True, "mlp_bias": True, "rope_theta": 5e3}
    ),
    "seed_oss-no-qkv-bias": Variant(
        "SeedOssConfig", BASE | {"head_dim": 8, "attention_bias": False, "hidden_act": "gelu"}
    ),
}
MUTANTS = {
    "seed_oss: eps": Mutant("seed_oss", lambda config: replace(config, norm_eps=1e-2)),
    "seed_oss: scale": Mutant("seed_oss", lambda config: replace(config, scale=8**-0.5)),
    "seed_oss: activation": Mutant("seed_oss", lambda config: replace(config, activation="gelu")),
    "seed_oss: theta": Mutant(
        "seed_oss-out_bias", lambda config: replace(config, ropes=(replace(config.ropes[0], theta=1e4),) * 2)
    ),
}
