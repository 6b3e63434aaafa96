from dataclasses import replace

from tests.models.families import BASE, Mutant, Variant

VARIANTS = {"llama-plain": Variant("LlamaConfig", BASE)}
MUTANTS = {
    "llama: eps": Mutant("llama-plain", lambda config: replace(config, norm_eps=1e-3)),
    "llama: activation": Mutant("llama-plain", lambda config: replace(config, activation="gelu")),
    "llama: theta": Mutant(
        "llama-plain", lambda config: replace(config, ropes=(replace(config.ropes[0], theta=5e3),) * 2)
    ),
}
