from dataclasses import replace

from tests.models.families import BASE, VOCAB, Mutant, Variant
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
}
MUTANTS = {
    "mamba2: eps": Mutant("mamba2", lambda config: replace(config, norm_eps=1e-2)),
    "mamba2: norm and gate": Mutant("mamba2", mixers(norm_first=True)),
    "mamba2: limits": Mutant("mamba2-bias-limits-tied", mixers(limits=(0.0, 0.9))),
    "mamba2: activation": Mutant("mamba2", mixers(activation="gelu")),
}
