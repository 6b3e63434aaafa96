from dataclasses import replace

from tests.models.families import BASE, Mutant, Variant
from tests.models.families.granitemoe import EXPERTS, SCALES
from tests.models.families.mixtral import routed

VARIANTS = {
    "granitemoeshared": Variant("GraniteMoeSharedConfig", BASE | EXPERTS | SCALES | {"shared_intermediate_size": 40}),
    "granitemoeshared-bias-tied-alone": Variant(
        "GraniteMoeSharedConfig", BASE | EXPERTS | {"attention_bias": True, "tie_word_embeddings": True}
    ),
}
MUTANTS = {
    "granitemoeshared: shares of all": Mutant("granitemoeshared", routed(among_chosen=False)),
    "granitemoeshared: residual_multiplier": Mutant(
        "granitemoeshared", lambda config: replace(config, residual_scale=1.0)
    ),
    "granitemoeshared: eps": Mutant("granitemoeshared", lambda config: replace(config, norm_eps=1e-2)),
}
