from dataclasses import replace

from tests.models.families import BASE, Mutant, Variant, of_ropes

GLM = BASE | {"head_dim": 16}
VARIANTS = {
    "glm": Variant("GlmConfig", GLM),
    "glm-linear-tied": Variant(
        "GlmConfig",
        GLM
        | {
            "attention_bias": False,
            "tie_word_embeddings": True,
            "partial_rotary_factor": 0.25,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0},
        },
    ),
    "glm-defaults": Variant("GlmConfig", {key: value for key, value in BASE.items() if key != "num_key_value_heads"}),
}
MUTANTS = {
    "glm: eps": Mutant("glm", lambda config: replace(config, norm_eps=1e-2)),
    "glm: activation": Mutant("glm", lambda config: replace(config, activation="gelu")),
    "glm: partial": Mutant("glm", of_ropes(dim=16)),
    "glm: interleaved": Mutant("glm", of_ropes(interleaved=False)),
}
