from dataclasses import replace

from tests.models.families import BASE, VOCAB, Mutant, Variant, of_ropes
from tests.models.families.mixtral import routed
from tests.models.families.qwen3_next import delta_nets as mixers

ALONE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 8,
    "head_dim": 8,
    "n_groups": 2,
    "state_size": 6,
    "chunk_size": 16,
}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 6,
    "mamba_chunk_size": 16,
}
GRANITE = {
    "attention_multiplier": 0.2,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "logits_scaling": 5.0,
    "num_experts_per_tok": 3,
    "shared_intermediate_size": 40,
    "layer_types": ["linear_attention", "full_attention"],
}
VARIANTS = {
    "mamba2": Variant("Mamba2Config", ALONE),
    "mamba2-bias-limits-tied": Variant(
        "Mamba2Config",
        ALONE
        | {
            "use_bias": True,
            "use_conv_bias": False,
            "hidden_act": "gelu",
            "conv_kernel": 3,
            "n_groups": 1,
            "time_step_limit": (0.6, 0.9),
            "tie_word_embeddings": True,
        },
    ),
    "bamba": Variant("BambaConfig", BASE | MAMBA | {"attn_layer_indices": [1]}),
    "bamba-bias-tied": Variant(
        "BambaConfig",
        BASE
        | MAMBA
        | {
            "attn_layer_indices": [0],
            "mamba_d_head": "auto",
            "mamba_proj_bias": True,
            "mamba_conv_bias": False,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        },
    ),
    "granitemoehybrid": Variant("GraniteMoeHybridConfig", BASE | MAMBA | GRANITE | {"num_local_experts": 6}),
    "granitemoehybrid-dense-rope-bias-tied": Variant(
        "GraniteMoeHybridConfig",
        BASE
        | MAMBA
        | GRANITE
        | {
            "num_local_experts": 0,
            "position_embedding_type": "rope",
            "attention_bias": True,
            "mamba_proj_bias": True,
            "time_step_limit": (0.6, 0.9),
            "tie_word_embeddings": True,
        },
    ),
    "falcon_h1": Variant(
        "FalconH1Config",
        BASE
        | MAMBA
        | {
            "mamba_d_ssm": 64,
            "lm_head_multiplier": 0.7,
            "embedding_multiplier": 3.0,
            "mlp_multipliers": [0.6, 0.8],
            "key_multiplier": 0.4,
            "attention_out_multiplier": 0.9,
            "attention_in_multiplier": 1.2,
            "ssm_multipliers": [0.5, 1.3, 0.8, 0.7, 1.4],
            "ssm_in_multiplier": 1.5,
            "ssm_out_multiplier": 0.6,
        },
    ),
    "falcon_h1-norm-bias-tied": Variant(
        "FalconH1Config",
        BASE
        | MAMBA
        | {
            "mamba_d_ssm": None,
            "mamba_rms_norm": True,
            "mamba_proj_bias": True,
            "projectors_bias": True,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "falcon_h1-norm-last": Variant(
        "FalconH1Config",
        BASE | MAMBA | {"mamba_d_ssm": 64, "mamba_rms_norm": True, "mamba_norm_before_gate": False},
    ),
}
MUTANTS = {
    "mamba2: eps": Mutant("mamba2", lambda config: replace(config, norm_eps=1e-2)),
    "mamba2: norm and gate": Mutant("mamba2", mixers(norm_first=True)),
    "mamba2: limits": Mutant("mamba2-bias-limits-tied", mixers(limits=(0.0, 0.9))),
    "mamba2: activation": Mutant("mamba2", mixers(activation="gelu")),
    "bamba: which part turns": Mutant("bamba", of_ropes(dim=8)),
    "granitemoehybrid: residual_multiplier": Mutant(
        "granitemoehybrid", lambda config: replace(config, residual_scale=1.0)
    ),
    "granitemoehybrid: shares of all": Mutant("granitemoehybrid", routed(among_chosen=False)),
    "granitemoehybrid: positions": Mutant("granitemoehybrid-dense-rope-bias-tied", of_ropes(theta=5000.0)),
    "falcon_h1: norm and gate": Mutant("falcon_h1-norm-bias-tied", mixers(norm_first=False)),
    "falcon_h1: gate and norm": Mutant("falcon_h1-norm-last", mixers(norm_first=True)),
    "falcon_h1: key_multiplier": Mutant("falcon_h1", lambda config: replace(config, scale=8**-0.5)),
    "falcon_h1: mlp_multipliers": Mutant("falcon_h1", lambda config: replace(config, mlp_scales=(1.0, 0.8))),
    "falcon_h1: attention_in_multiplier": Mutant(
        "falcon_h1", lambda config: replace(config, attention_scales=(1, 0.9))
    ),
    "falcon_h1: ssm_out_multiplier": Mutant("falcon_h1", lambda config: replace(config, mamba_scale=1.0)),
    "falcon_h1: ssm_in_multiplier": Mutant("falcon_h1", mixers(in_scale=1.0)),
    "falcon_h1: ssm_multipliers": Mutant("falcon_h1", mixers(scales=(0.5, 1.3, 0.7, 0.8, 1.4))),
}
