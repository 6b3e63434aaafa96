from dataclasses import replace

from tests.models.families import BASE, VOCAB, Mutant, Variant
from tests.models.families.mixtral import routed
from tests.models.families.qwen3_next import delta_nets as mixers

ALONE = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 6}
JAMBA = {
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "mamba_d_state": 6,
}
VARIANTS = {
    "mamba": Variant("MambaConfig", ALONE),
    "mamba-bias-rank-untied": Variant(
        "MambaConfig",
        ALONE
        | {
            "use_bias": True,
            "use_conv_bias": False,
            "hidden_act": "gelu",
            "conv_kernel": 3,
            "expand": 3,
            "time_step_rank": 5,
            "tie_word_embeddings": False,
        },
    ),
    "falcon_mamba": Variant("FalconMambaConfig", ALONE | {"mixer_rms_eps": 1e-3}),
    "jamba": Variant("JambaConfig", BASE | JAMBA | {"num_hidden_layers": 3}),
    "jamba-dense-bias-tied": Variant(
        "JambaConfig",
        BASE
        | JAMBA
        | {
            "num_experts": 1,
            "num_experts_per_tok": 1,
            "attn_layer_offset": 0,
            "mamba_dt_rank": 5,
            "mamba_proj_bias": True,
            "mamba_conv_bias": False,
            "tie_word_embeddings": True,
        },
    ),
}
MUTANTS = {
    "mamba: eps": Mutant("mamba", lambda config: replace(config, norm_eps=1e-2)),
    "mamba: activation": Mutant("mamba", mixers(activation="gelu")),
    "falcon_mamba: eps": Mutant("falcon_mamba", mixers(norm_eps=1e-6)),
    "falcon_mamba: norms": Mutant("falcon_mamba", mixers(norm_eps=None)),
    "jamba: shares do not add up to one": Mutant("jamba", routed(normalized=True)),
    "jamba: eps": Mutant("jamba", mixers(norm_eps=1e-2)),
}
