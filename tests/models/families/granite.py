from dataclasses import replace

from tests.models.families import BASE, Mutant, Variant

MULTIPLIERS = {
    "attention_multiplier": 0.2,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "logits_scaling": 5.0,
}
VARIANTS = {
    "granite": Variant("GraniteConfig", BASE | MULTIPLIERS),
    "granite-bias-tied": Variant(
        "GraniteConfig", BASE | MULTIPLIERS | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
    ),
    "granite-defaults": Variant("GraniteConfig", BASE),
}
MUTANTS = {
    "granite: attention_multiplier": Mutant("granite", lambda config: replace(config, scale=8**-0.5)),
    "granite: embedding_multiplier": Mutant("granite", lambda config: replace(config, embedding_scale=1.0)),
    "granite: residual_multiplier": Mutant("granite", lambda config: replace(config, residual_scale=1.0)),
    "granite: logits_scaling": Mutant("granite", lambda config: replace(config, logit_scale=1.0)),
}
