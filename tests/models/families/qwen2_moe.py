from dataclasses import replace

from tests.models.families import BASE, Mutant, Variant
from tests.models.families.mixtral import routed

EXPERTS = {
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}
VARIANTS = {
    "qwen2_moe": Variant("Qwen2MoeConfig", BASE | EXPERTS),
    "qwen2_moe-normalized-unbiased-tied": Variant(
        "Qwen2MoeConfig", BASE | EXPERTS | {"norm_topk_prob": True, "qkv_bias": False, "tie_word_embeddings": True}
    ),
    "qwen2_moe-step": Variant("Qwen2MoeConfig", BASE | EXPERTS | {"num_hidden_layers": 3, "decoder_sparse_step": 2}),
    "qwen2_moe-dense-window": Variant(
        "Qwen2MoeConfig",
        BASE
        | EXPERTS
        | {"mlp_only_layers": [0], "use_sliding_window": True, "sliding_window": 20, "max_window_layers": 2},
    ),
}
MUTANTS = {
    "qwen2_moe: eps": Mutant("qwen2_moe", lambda config: replace(config, norm_eps=1e-2)),
    "qwen2_moe: shares do not add up to one": Mutant("qwen2_moe", routed(normalized=True)),
    "qwen2_moe: shares add up to one": Mutant("qwen2_moe-normalized-unbiased-tied", routed(normalized=False)),
    "qwen2_moe: how many experts": Mutant("qwen2_moe", routed(top_k=2)),
    "qwen2_moe: shares of those chosen": Mutant("qwen2_moe", routed(among_chosen=True)),
    "qwen2_moe: scale": Mutant("qwen2_moe", routed(scale=1.1)),
    "qwen2_moe: window": Mutant("qwen2_moe-dense-window", lambda config: replace(config, windows=(21, None))),
    "qwen2_moe: which layers slide": Mutant(
        "qwen2_moe-dense-window", lambda config: replace(config, windows=(None, 20))
    ),
}
