from dataclasses import replace

from tests.models.families import BASE, Mutant, Variant
from tests.models.families.mixtral import routed

EXPERTS = {
    "moe_num_experts": 6,
    "moe_k": 3,
    "moe_intermediate_size": 24,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 0,
}
VARIANTS = {
    "ernie4_5_moe": Variant("Ernie4_5_MoeConfig", BASE | EXPERTS),
    "ernie4_5_moe-bias-least": Variant(
        "Ernie4_5_MoeConfig",
        BASE
        | EXPERTS
        | {"use_bias": True, "tie_word_embeddings": False, "moe_norm_min": 0.9, "moe_num_shared_experts": 1},
    ),
    "ernie4_5_moe-some-alone-tied": Variant(
        "Ernie4_5_MoeConfig",
        BASE
        | EXPERTS
        | {
            "num_hidden_layers": 4,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 2,
            "moe_layer_interval": 2,
            "moe_num_shared_experts": 0,
            "tie_word_embeddings": True,
        },
    ),
}
MUTANTS = {
    "ernie4_5_moe: eps": Mutant("ernie4_5_moe", lambda config: replace(config, norm_eps=1e-2)),
    "ernie4_5_moe: pairs": Mutant(
        "ernie4_5_moe", lambda config: replace(config, ropes=(replace(config.ropes[0], interleaved=False),) * 2)
    ),
    "ernie4_5_moe: sigmoid": Mutant("ernie4_5_moe", routed(scores="sigmoid")),
    "ernie4_5_moe: shares add up to one": Mutant("ernie4_5_moe", routed(normalized=False)),
    "ernie4_5_moe: moe_norm_min": Mutant("ernie4_5_moe-bias-least", routed(least_sum=1e-12)),
    "ernie4_5_moe: how many experts": Mutant("ernie4_5_moe", routed(top_k=2)),
}
