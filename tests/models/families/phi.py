from dataclasses import replace

from tests.models.families import BASE, Mutant, Variant, of_ropes

VARIANTS = {
    "phi": Variant("PhiConfig", BASE),
    "phi-norms": Variant(
        "PhiConfig",
        BASE | {"qk_layernorm": True, "partial_rotary_factor": 0.75, "num_key_value_heads": None, "rope_theta": 300.0},
    ),
    "phi-activation": Variant("PhiConfig", BASE | {"hidden_act": "relu", "layer_norm_eps": 1e-2}),
}
MUTANTS = {
    "phi: eps": Mutant("phi", lambda config: replace(config, norm_eps=1e-2)),
    "phi: eps of queries and keys": Mutant("phi-norms", lambda config: replace(config, norm_eps=1e-2)),
    "phi: activation": Mutant("phi", lambda config: replace(config, activation="silu")),
    "phi: partial": Mutant("phi", of_ropes(dim=8)),
}
