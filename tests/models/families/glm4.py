from dataclasses import replace

from tests.models.families import BASE, Mutant, Variant, of_ropes

GLM = BASE | {"head_dim": 16}
VARIANTS = {
    "glm4": Variant("Glm4Config", GLM),
    "glm4-tied": Variant(
        "Glm4Config", GLM | {"attention_bias": False, "tie_word_embeddings": True, "partial_rotary_factor": 1.0}
    ),
}
MUTANTS = {
    "glm4: eps": Mutant("glm4", lambda config: replace(config, norm_eps=1e-2)),
    "glm4: partial": Mutant("glm4", of_ropes(dim=16)),
    "glm4: interleaved": Mutant("glm4-tied", of_ropes(interleaved=False)),
}
