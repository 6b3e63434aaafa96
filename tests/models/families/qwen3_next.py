from dataclasses import replace

from tests.models.families import BASE, Mutant, Variant, of_ropes
from tests.models.families.mixtral import routed

EXPERTS = {
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}
DELTA_NET = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 4,
}
BOTH = ["linear_attention", "full_attention"]
VARIANTS = {
    "qwen3_next": Variant("Qwen3NextConfig", BASE | EXPERTS | DELTA_NET | {"layer_types": BOTH}),
    "qwen3_next-plain-dense-bias-tied": Variant(
        "Qwen3NextConfig",
        BASE
        | EXPERTS
        | DELTA_NET
        | {
            "num_hidden_layers": 4,
            "mlp_only_layers": [1],
            "decoder_sparse_step": 2,
            "norm_topk_prob": False,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "linear_num_value_heads": 2,
            "linear_conv_kernel_dim": 2,
            "hidden_act": "gelu",
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
        },
    ),
}


def delta_nets(**changes):
    """A mutant's change of them."""
    return lambda config: replace(config, mixers=tuple(mixer and replace(mixer, **changes) for mixer in config.mixers))


MUTANTS = {
    "qwen3_next: eps": Mutant("qwen3_next", lambda config: replace(config, norm_eps=1e-2)),
    "qwen3_next: offset": Mutant("qwen3_next", lambda config: replace(config, norm_offset=0.0)),
    "qwen3_next: which part turns": Mutant("qwen3_next", of_ropes(dim=8)),
    "qwen3_next: activation of the convolution": Mutant("qwen3_next", delta_nets(activation="gelu")),
    "qwen3_next: shares add up to one": Mutant("qwen3_next", routed(normalized=False)),
    "qwen3_next: shares do not add up to one": Mutant("qwen3_next-plain-dense-bias-tied", routed(normalized=True)),
    "qwen3_next: activation": Mutant("qwen3_next", lambda config: replace(config, activation="gelu")),
}
