from dataclasses import replace

from tests.models.families import BASE, Mutant, Variant

YARN = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 16}
ALONE = {name: value for name, value in BASE.items() if name != "num_key_value_heads"}
VARIANTS = {
    "olmo2": Variant("Olmo2Config", BASE | {"rms_norm_eps": 1e-6}),
    "olmo2-bias-tied": Variant("Olmo2Config", ALONE | {"attention_bias": True, "tie_word_embeddings": True}),
    "olmo2-yarn": Variant("Olmo2Config", BASE | {"rope_parameters": YARN, "head_dim": 16, "hidden_act": "gelu"}),
}
MUTANTS = {
    "olmo2: eps": Mutant("olmo2", lambda config: replace(config, norm_eps=1e-2)),
    "olmo2: activation": Mutant("olmo2", lambda config: replace(config, activation="gelu")),
    "olmo2: scale": Mutant("olmo2", lambda config: replace(config, scale=32**-0.5)),
    "olmo2: rope": Mutant("olmo2", lambda config: replace(config, ropes=(None,) * 2)),
    "olmo2: interleaved": Mutant(
        "olmo2", lambda config: replace(config, ropes=(replace(config.ropes[0], interleaved=True),) * 2)
    ),
    "olmo2: yarn": Mutant(
        "olmo2-yarn", lambda config: replace(config, ropes=(replace(config.ropes[0], kind="default"),) * 2)
    ),
}
