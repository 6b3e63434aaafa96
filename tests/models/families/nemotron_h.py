from dataclasses import replace

from tests.models.families import BASE, Mutant, Variant
from tests.models.families.mixtral import routed
from tests.models.families.qwen3_next import delta_nets as mixers

SMALL = {name: value for name, value in BASE.items() if name != "num_hidden_layers"}
SMALL |= {
    "head_dim": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 6,
    "n_groups": 2,
    "ssm_state_size": 6,
    "chunk_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 40,
    "routed_scaling_factor": 1.7,
}
KINDS = ["linear_attention", "moe", "full_attention", "mlp"]
VARIANTS = {
    "nemotron_h": Variant("NemotronHConfig", SMALL | {"layers_block_type": KINDS}),
    "nemotron_h-latent-bias-plain-tied": Variant(
        "NemotronHConfig",
        SMALL
        | {
            "hybrid_override_pattern": "ME*-",
            "moe_latent_size": 20,
            "mlp_bias": True,
            "use_bias": True,
            "use_conv_bias": False,
            "norm_topk_prob": False,
            "mlp_hidden_act": "silu",
            "time_step_min": 0.6,
        },
    ),
}
MUTANTS = {
    "nemotron_h: eps": Mutant("nemotron_h", lambda config: replace(config, norm_eps=1e-2)),
    "nemotron_h: groups of experts": Mutant("nemotron_h", routed(groups=1)),
    "nemotron_h: scale": Mutant("nemotron_h", routed(scale=1.0)),
    "nemotron_h: least time step": Mutant("nemotron_h-latent-bias-plain-tied", mixers(limits=(0.0, 9.0))),
    "nemotron_h: activation": Mutant("nemotron_h", lambda config: replace(config, activation="relu")),
}
