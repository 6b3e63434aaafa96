from dataclasses import replace

from tests.models.families import BASE, Mutant, Variant, of_ropes

HUNYUAN = BASE | {"head_dim": 16}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 200.0, "factor": 1.0}
VARIANTS = {
    "hunyuan_v1_dense": Variant("HunYuanDenseV1Config", HUNYUAN),
    "hunyuan_v1_dense-alpha": Variant(
        "HunYuanDenseV1Config",
        HUNYUAN
        | {
            "rope_parameters": DYNAMIC | {"alpha": 50.0},
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "hunyuan_v1_dense-dynamic": Variant("HunYuanDenseV1Config", HUNYUAN | {"rope_parameters": DYNAMIC}),
}
MUTANTS = {
    "hunyuan_v1_dense: eps": Mutant("hunyuan_v1_dense", lambda config: replace(config, norm_eps=1e-2)),
    "hunyuan_v1_dense: activation": Mutant("hunyuan_v1_dense", lambda config: replace(config, activation="gelu")),
    "hunyuan_v1_dense: alpha": Mutant("hunyuan_v1_dense-alpha", of_ropes(theta=200.0)),
    "hunyuan_v1_dense: alpha, without its power": Mutant("hunyuan_v1_dense-alpha", of_ropes(theta=200.0 * 50)),
}
