from dataclasses import replace

from tests.models.families import BASE, Mutant, Variant

OTHERS = ("intermediate_size", "num_key_value_heads", "tie_word_embeddings")
FIELDS = {name: value for name, value in BASE.items() if name not in OTHERS} | {"ffn_dim": 48}
VARIANTS = {
    "opt": Variant("OPTConfig", FIELDS),
    "opt-350m": Variant("OPTConfig", FIELDS | {"do_layer_norm_before": False, "word_embed_proj_dim": 24}),
    "opt-no-final-norm": Variant(
        "OPTConfig",
        FIELDS | {"_remove_final_layer_norm": True, "word_embed_proj_dim": 40, "tie_word_embeddings": False},
    ),
    "opt-no-bias": Variant(
        "OPTConfig",
        FIELDS | {"enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"},
    ),
}
MUTANTS = {
    "opt: eps": Mutant("opt", lambda config: replace(config, norm_eps=1e-2)),
    "opt: activation": Mutant("opt", lambda config: replace(config, activation="gelu")),
    "opt: the other activation": Mutant("opt-no-bias", lambda config: replace(config, activation="relu")),
    "opt: norms after": Mutant("opt", lambda config: replace(config, norm_first=False)),
    "opt: norms before": Mutant("opt-350m", lambda config: replace(config, norm_first=True)),
    "opt: scale": Mutant("opt", lambda config: replace(config, scale=1.0)),
}
