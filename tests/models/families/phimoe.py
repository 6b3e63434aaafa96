import json
from dataclasses import replace
from pathlib import Path

from tests.models.families import BASE, Mutant, Variant, of_ropes
from tests.models.families.mixtral import routed

PHI = BASE | {"num_local_experts": 6}
FACTORS = {"short_factor": [1.0, 1.3, 2.5, 1.7], "long_factor": [1.5, 4.0, 9.0, 2.0]}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 300.0,
    "original_max_position_embeddings": 128,
    "short_mscale": 1.3,
    "long_mscale": 1.7,
}


def as_on_the_hub(folder: Path) -> None:
    """With its name of the class, and what it calls rotary embeddings."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config |= {"architectures": ["PhiMoEForCausalLM"], "rope_theta": rope.pop("rope_theta")}
    config |= {"original_max_position_embeddings": rope["original_max_position_embeddings"]}
    path.write_text(json.dumps(config | {"rope_scaling": {"type": rope.pop("rope_type"), **rope}}))


VARIANTS = {
    "phimoe": Variant("PhimoeConfig", PHI | {"router_jitter_noise": 0.2, "lm_head_bias": True}),
    "phimoe-window-bias-tied": Variant(
        "PhimoeConfig", PHI | {"sliding_window": 20, "attention_bias": True, "tie_word_embeddings": True}
    ),
    "phimoe-longrope": Variant(
        "PhimoeConfig",
        PHI
        | {"rope_parameters": LONG | FACTORS, "router_jitter_noise": 0.5, "attention_bias": True, "lm_head_bias": True},
        as_on_the_hub,
    ),
    "phimoe-one-head_dim": Variant(
        "PhimoeConfig", PHI | {"router_jitter_noise": 0.0, "num_local_experts": 2, "head_dim": 16}
    ),
}
MUTANTS = {
    "phimoe: eps": Mutant("phimoe", lambda config: replace(config, norm_eps=1e-2)),
    "phimoe: activation": Mutant("phimoe", lambda config: replace(config, activation="gelu")),
    "phimoe: router_jitter_noise": Mutant("phimoe", routed(sparsemixer=0.1)),
    "phimoe: scores of all": Mutant("phimoe", routed(sparsemixer=None)),
    "phimoe: shares add up to one": Mutant("phimoe", routed(normalized=True)),
    "phimoe: default jitter": Mutant("phimoe-window-bias-tied", routed(sparsemixer=0.3)),
    "phimoe: window": Mutant("phimoe-window-bias-tied", lambda config: replace(config, windows=(21, 21))),
    "phimoe: theta": Mutant("phimoe-window-bias-tied", of_ropes(theta=10000.0)),
    "phimoe: short factors": Mutant("phimoe-longrope", of_ropes(short_factors=(1.0, 1.0, 1.0, 1.0))),
    "phimoe: short_mscale": Mutant("phimoe-longrope", of_ropes(attention_factor=1.0)),
}
