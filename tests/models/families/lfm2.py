from dataclasses import replace

from tests.models.families import BASE, Mutant, Variant, of_ropes
from tests.models.families.mixtral import routed

BOTH = {"layer_types": ["conv", "full_attention"]}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "num_dense_layers": 1}
VARIANTS = {
    "lfm2": Variant("Lfm2Config", BASE | BOTH | {"block_multiple_of": 8, "tie_word_embeddings": True}),
    "lfm2-bias-untied": Variant(
        "Lfm2Config",
        BASE
        | {
            "num_hidden_layers": 3,
            "full_attn_idxs": [1],
            "conv_bias": True,
            "conv_L_cache": 5,
            "block_auto_adjust_ff_dim": False,
        },
    ),
    "lfm2-factor": Variant(
        "Lfm2Config",
        BASE
        | BOTH
        | {"block_ffn_dim_multiplier": 1.3, "block_multiple_of": 7, "block_ff_dim": 60, "tie_embedding": True},
    ),
    "lfm2_moe": Variant(
        "Lfm2MoeConfig", BASE | EXPERTS | {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}
    ),
    "lfm2_moe-unbiased-plain-tied": Variant(
        "Lfm2MoeConfig",
        BASE
        | EXPERTS
        | BOTH
        | {
            "use_expert_bias": False,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.7,
            "conv_bias": True,
            "tie_word_embeddings": True,
            "num_dense_layers": 0,
        },
    ),
}
MUTANTS = {
    "lfm2: eps": Mutant("lfm2", lambda config: replace(config, norm_eps=1e-2)),
    "lfm2: theta": Mutant("lfm2", of_ropes(theta=10000.0)),
    "lfm2_moe: how many experts": Mutant("lfm2_moe", routed(top_k=2)),
    "lfm2_moe: shares add up to one": Mutant("lfm2_moe", routed(normalized=False)),
    "lfm2_moe: scores": Mutant("lfm2_moe", routed(scores="softmax")),
    "lfm2_moe: scale": Mutant("lfm2_moe-unbiased-plain-tied", routed(scale=1.0)),
}
