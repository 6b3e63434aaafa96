from dataclasses import replace

from tests.models.families import BASE, Mutant, Variant

ALONE = {name: value for name, value in BASE.items() if name != "num_key_value_heads"}
VARIANTS = {
    "olmo": Variant("OlmoConfig", ALONE),
    "olmo-clip": Variant("OlmoConfig", BASE | {"clip_qkv": 0.5, "head_dim": 16}),
    "olmo-bias-tied": Variant("OlmoConfig", BASE | {"attention_bias": True, "tie_word_embeddings": True}),
}
MUTANTS = {
    "olmo: eps": Mutant("olmo", lambda config: replace(config, norm_eps=1e-2)),
    "olmo: activation": Mutant("olmo", lambda config: replace(config, activation="gelu")),
    "olmo: theta": Mutant("olmo", lambda config: replace(config, ropes=(replace(config.ropes[0], theta=2e3),) * 2)),
    "olmo: no clip": Mutant("olmo-clip", lambda config: replace(config, qkv_clip=None)),
    "olmo: clip": Mutant("olmo-clip", lambda config: replace(config, qkv_clip=0.55)),
}
