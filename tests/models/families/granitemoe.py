from dataclasses import replace

from tests.models.families import BASE, Mutant, Variant
from tests.models.families.mixtral import routed

EXPERTS = {"num_local_experts": 5, "num_experts_per_tok": 3}
SCALES = {
    "embedding_multiplier": 2.0,
    "logits_scaling": 3.0,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.2,
}
VARIANTS = {
    "granitemoe": Variant("GraniteMoeConfig", BASE | EXPERTS | SCALES),
    "granitemoe-bias-tied": Variant(
        "GraniteMoeConfig",
        BASE | EXPERTS | {"attention_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 4},
    ),
}
MUTANTS = {
    "granitemoe: eps": Mutant("granitemoe", lambda config: replace(config, norm_eps=1e-2)),
    "granitemoe: shares of all": Mutant("granitemoe", routed(among_chosen=False)),
    "granitemoe: how many experts": Mutant("granitemoe", routed(top_k=2)),
    "granitemoe: embedding_multiplier": Mutant("granitemoe", lambda config: replace(config, embedding_scale=1.0)),
    "granitemoe: logits_scaling": Mutant("granitemoe", lambda config: replace(config, logit_scale=1.0)),
    "granitemoe: residual_multiplier": Mutant("granitemoe", lambda config: replace(config, residual_scale=1.0)),
    "granitemoe: attention_multiplier": Mutant("granitemoe", lambda config: replace(config, scale=8**-0.5)),
}
