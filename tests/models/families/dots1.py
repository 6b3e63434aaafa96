from dataclasses import replace

from tests.models.families import BASE, Mutant, Variant
from tests.models.families.glm4_moe import EXPERTS, GROUPS
from tests.models.families.mixtral import routed

ALL = {"sliding_window": None, "max_window_layers": 2}
VARIANTS = {
    "dots1": Variant("Dots1Config", BASE | EXPERTS | ALL | {"norm_topk_prob": True, "routed_scaling_factor": 2.5}),
    "dots1-groups-bias-window": Variant(
        "Dots1Config",
        BASE | EXPERTS | GROUPS | {"attention_bias": True, "sliding_window": 20, "max_window_layers": 1},
    ),
}
MUTANTS = {
    "dots1: eps": Mutant("dots1", lambda config: replace(config, norm_eps=1e-2)),
    "dots1: routed_scaling_factor": Mutant("dots1", routed(scale=1.0)),
    "dots1: shares add up to one": Mutant("dots1", routed(normalized=False)),
    "dots1: groups": Mutant("dots1-groups-bias-window", routed(groups_kept=4)),
    "dots1: shares do not add up to one": Mutant("dots1-groups-bias-window", routed(normalized=True)),
    "dots1: window": Mutant("dots1-groups-bias-window", lambda config: replace(config, windows=(None, 21))),
}
