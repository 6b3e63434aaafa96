from dataclasses import replace

from tests.models.families import BASE, Mutant, Variant
from tests.models.families.mixtral import routed

EXPERTS = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "head_dim": 16,
}
GROUPS = {"n_group": 4, "topk_group": 2}
VARIANTS = {
    "glm4_moe": Variant("Glm4MoeConfig", BASE | EXPERTS | GROUPS | {"routed_scaling_factor": 2.5}),
    "glm4_moe-norms-bias-plain-tied": Variant(
        "Glm4MoeConfig",
        BASE
        | EXPERTS
        | {
            "use_qk_norm": True,
            "attention_bias": True,
            "norm_topk_prob": False,
            "first_k_dense_replace": 0,
            "n_shared_experts": 1,
            "tie_word_embeddings": True,
        },
    ),
}
MUTANTS = {
    "glm4_moe: eps": Mutant("glm4_moe", lambda config: replace(config, norm_eps=1e-2)),
    "glm4_moe: groups": Mutant("glm4_moe", routed(groups_kept=4)),
    "glm4_moe: how good a group is": Mutant("glm4_moe", routed(group_best=1)),
    "glm4_moe: routed_scaling_factor": Mutant("glm4_moe", routed(scale=1.0)),
    "glm4_moe: shares add up to one": Mutant("glm4_moe", routed(normalized=False)),
    "glm4_moe: shares do not add up to one": Mutant("glm4_moe-norms-bias-plain-tied", routed(normalized=True)),
    "glm4_moe: softmax": Mutant("glm4_moe-norms-bias-plain-tied", routed(scores="softmax")),
    "glm4_moe: partial rope": Mutant(
        "glm4_moe", lambda config: replace(config, ropes=(replace(config.ropes[0], dim=16),) * 2)
    ),
}
