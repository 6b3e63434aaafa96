from dataclasses import replace

from tests.models.families import BASE, Mutant, Variant
from tests.models.families.mixtral import routed

EXPERTS = {"num_local_experts": 6, "num_experts_per_tok": 3, "head_dim": 16}
VARIANTS = {
    "minimax_m2": Variant("MiniMaxM2Config", BASE | EXPERTS | {"rotary_dim": 8}),
    "minimax_m2-whole-tied": Variant("MiniMaxM2Config", BASE | EXPERTS | {"tie_word_embeddings": True}),
}
MUTANTS = {
    "minimax_m2: eps": Mutant("minimax_m2", lambda config: replace(config, norm_eps=1e-2)),
    "minimax_m2: rotary_dim": Mutant(
        "minimax_m2", lambda config: replace(config, ropes=(replace(config.ropes[0], dim=16),) * 2)
    ),
    "minimax_m2: softmax": Mutant("minimax_m2", routed(scores="softmax")),
    "minimax_m2: shares add up to one": Mutant("minimax_m2", routed(normalized=False)),
    "minimax_m2: how many experts": Mutant("minimax_m2", routed(top_k=2)),
}
