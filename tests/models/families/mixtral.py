from dataclasses import replace

from tests.models.families import BASE, Mutant, Variant


def routed(**changes):
    return lambda config: replace(config, routing=replace(config.routing, **changes))


VARIANTS = {
    "mixtral": Variant("MixtralConfig", BASE | {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral-window-head_dim-gelu-tied": Variant(
        "MixtralConfig",
        BASE
        | {
            "num_local_experts": 4,
            "num_experts_per_tok": 3,
            "sliding_window": 20,
            "head_dim": 16,
            "hidden_act": "gelu",
            "tie_word_embeddings": True,
        },
    ),
    "mixtral-one": Variant("MixtralConfig", BASE | {"num_local_experts": 3, "num_experts_per_tok": 1}),
}
MUTANTS = {
    "mixtral: eps": Mutant("mixtral", lambda config: replace(config, norm_eps=1e-2)),
    "mixtral: activation": Mutant("mixtral", lambda config: replace(config, activation="gelu")),
    "mixtral: shares add up to one": Mutant("mixtral", routed(normalized=False)),
    "mixtral: how many experts": Mutant("mixtral", routed(top_k=3)),
    "mixtral: sigmoid": Mutant("mixtral", routed(scores="sigmoid")),
    "mixtral: window": Mutant("mixtral-window-head_dim-gelu-tied", lambda config: replace(config, windows=(21, 21))),
}
