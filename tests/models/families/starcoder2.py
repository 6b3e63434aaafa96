from dataclasses import replace

from tests.models.families import BASE, Mutant, Variant

VARIANTS = {
    "starcoder2": Variant("Starcoder2Config", BASE),
    "starcoder2-window-tied": Variant(
        "Starcoder2Config", BASE | {"sliding_window": 16, "tie_word_embeddings": True, "rope_theta": 1e5}
    ),
    "starcoder2-no-bias": Variant("Starcoder2Config", BASE | {"use_bias": False, "norm_epsilon": 1e-3}),
}
MUTANTS = {
    "starcoder2: eps": Mutant("starcoder2", lambda config: replace(config, norm_eps=1e-2)),
    "starcoder2: eps's name": Mutant("starcoder2-no-bias", lambda config: replace(config, norm_eps=1e-5)),
    "starcoder2: activation": Mutant("starcoder2", lambda config: replace(config, activation="silu")),
    "starcoder2: window + 1": Mutant("starcoder2-window-tied", lambda config: replace(config, windows=(17,) * 2)),
    "starcoder2: no window": Mutant("starcoder2-window-tied", lambda config: replace(config, windows=(None,) * 2)),
    "starcoder2: theta": Mutant(
        "starcoder2-window-tied", lambda config: replace(config, ropes=(replace(config.ropes[0], theta=1e4),) * 2)
    ),
}
