from dataclasses import replace

from jaxinfer.layers.mlp import ClampedSwiGLU
from tests.models.families import BASE, Mutant, Variant, of_ropes
from tests.models.families.mixtral import routed

SMALL = {
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "head_dim": 16,
    "sliding_window": 20,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "truncate": False,
        "original_max_position_embeddings": 32,
    },
}
VARIANTS = {
    "gpt_oss": Variant("GptOssConfig", BASE | SMALL),
    "gpt_oss-clamped-plain-tied": Variant(
        "GptOssConfig",
        BASE
        | SMALL
        | {
            "swiglu_limit": 0.5,
            "swiglu_alpha": 1.0,
            "attention_bias": False,
            "layer_types": ["full_attention", "sliding_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "tie_word_embeddings": True,
        },
    ),
}
MUTANTS = {
    "gpt_oss: eps": Mutant("gpt_oss", lambda config: replace(config, norm_eps=1e-2)),
    "gpt_oss: alpha": Mutant("gpt_oss", lambda config: replace(config, expert_gating=ClampedSwiGLU(1.0, 7.0))),
    "gpt_oss: limit": Mutant(
        "gpt_oss-clamped-plain-tied", lambda config: replace(config, expert_gating=ClampedSwiGLU(1.0, 7.0))
    ),
    "gpt_oss: softmax of all": Mutant("gpt_oss", routed(among_chosen=False)),
    "gpt_oss: how many experts": Mutant("gpt_oss", routed(top_k=4)),
    "gpt_oss: windows": Mutant("gpt_oss", lambda config: replace(config, windows=config.windows[::-1])),
    "gpt_oss: window": Mutant("gpt_oss", lambda config: replace(config, windows=(None, None))),
    "gpt_oss: yarn truncated": Mutant("gpt_oss", of_ropes(truncate=True)),
    "gpt_oss: scale": Mutant("gpt_oss", lambda config: replace(config, scale=8**-0.5)),
}
