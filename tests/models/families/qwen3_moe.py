from dataclasses import replace

from tests.models.families import BASE, Mutant, Variant
from tests.models.families.mixtral import routed

EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "head_dim": 16}
VARIANTS = {
    "qwen3_moe": Variant("Qwen3MoeConfig", BASE | EXPERTS | {"norm_topk_prob": True}),
    "qwen3_moe-bias-plain-tied": Variant(
        "Qwen3MoeConfig", BASE | EXPERTS | {"attention_bias": True, "tie_word_embeddings": True}
    ),
    "qwen3_moe-dense-window": Variant(
        "Qwen3MoeConfig",
        BASE | EXPERTS | {"mlp_only_layers": [1], "use_sliding_window": True, "sliding_window": 20},
    ),
    "qwen3_moe-all": Variant("Qwen3MoeConfig", BASE | EXPERTS | {"num_experts": 3, "num_experts_per_tok": 3}),
}
MUTANTS = {
    "qwen3_moe: eps": Mutant("qwen3_moe", lambda config: replace(config, norm_eps=1e-2)),
    "qwen3_moe: shares add up to one": Mutant("qwen3_moe", routed(normalized=False)),
    "qwen3_moe: shares do not add up to one": Mutant("qwen3_moe-bias-plain-tied", routed(normalized=True)),
    "qwen3_moe: how many experts": Mutant("qwen3_moe", routed(top_k=4)),
    "qwen3_moe: sigmoid": Mutant("qwen3_moe", routed(scores="sigmoid")),
    "qwen3_moe: activation": Mutant("qwen3_moe", lambda config: replace(config, activation="gelu")),
    "qwen3_moe: scale": Mutant("qwen3_moe", lambda config: replace(config, scale=8**-0.5)),
    "qwen3_moe: window": Mutant("qwen3_moe-dense-window", lambda config: replace(config, windows=(None, None))),
}
