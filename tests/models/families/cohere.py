from dataclasses import replace

from tests.models.families import BASE, Mutant, Variant

VARIANTS = {
    "cohere": Variant("CohereConfig", BASE | {"tie_word_embeddings": True}),
    "cohere-qk-norm": Variant("CohereConfig", BASE | {"use_qk_norm": True, "logit_scale": 0.8, "head_dim": 16}),
    "cohere-bias": Variant(
        "CohereConfig", BASE | {"attention_bias": True, "use_qk_norm": True, "num_key_value_heads": None}
    ),
}
MUTANTS = {
    "cohere: logit_scale": Mutant("cohere", lambda config: replace(config, logit_scale=1.0)),
    "cohere: halves turn": Mutant(
        "cohere", lambda config: replace(config, ropes=(replace(config.ropes[0], interleaved=False),) * 2)
    ),
    "cohere: theta": Mutant("cohere", lambda config: replace(config, ropes=(replace(config.ropes[0], theta=1e4),) * 2)),
    "cohere: eps": Mutant("cohere", lambda config: replace(config, norm_eps=1e-2)),
    "cohere: eps of queries and keys": Mutant("cohere-qk-norm", lambda config: replace(config, norm_eps=1e-2)),
    "cohere: activation": Mutant("cohere", lambda config: replace(config, activation="gelu")),
    "cohere: scale": Mutant("cohere-qk-norm", lambda config: replace(config, scale=8**-0.5)),
}
