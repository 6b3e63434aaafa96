import json
from dataclasses import replace
from pathlib import Path

from tests.models.families import BASE, Mutant, Variant, of_ropes
from tests.models.families.hunyuan_v1_dense import DYNAMIC, HUNYUAN
from tests.models.families.mixtral import routed

EXPERTS = {"num_experts": 6, "moe_topk": 3}


def as_on_the_hub(folder: Path) -> None:
    """With what transformers writes no more, or otherwise."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    layers = config["num_hidden_layers"]
    lists = {"moe_topk": config["moe_topk"], "moe_intermediate_size": config["intermediate_size"]}
    config |= {name: [value] * layers for name, value in (lists | {"num_shared_expert": 1}).items()}
    config |= {"attention_head_dim": config.pop("head_dim"), "rope_theta": rope.pop("rope_theta")}
    config |= {"rope_scaling": {"type": rope.pop("rope_type"), **rope, "beta_fast": 32, "mscale": 1.0}}
    flags = {"use_qk_norm": True, "use_mixed_mlp_moe": True, "norm_topk_prob": True, "use_cla": False}
    path.write_text(json.dumps(config | flags | {"moe_layer_num_skipped": 0, "cla_share_factor": 2}))


VARIANTS = {
    "hunyuan_v1_moe": Variant("HunYuanMoEV1Config", HUNYUAN | EXPERTS),
    "hunyuan_v1_moe-alpha-tied": Variant(
        "HunYuanMoEV1Config",
        HUNYUAN | EXPERTS | {"rope_parameters": DYNAMIC | {"alpha": 50.0}, "tie_word_embeddings": True},
        as_on_the_hub,
    ),
    "hunyuan_v1_moe-layers-bias": Variant(
        "HunYuanMoEV1Config",
        HUNYUAN
        | {"num_experts": 5, "moe_topk": [1, 4], "attention_bias": True, "rope_parameters": DYNAMIC}
        | {"num_key_value_heads": None},
    ),
    "hunyuan_v1_moe-one": Variant("HunYuanMoEV1Config", BASE | {"head_dim": 8}),
}
MUTANTS = {
    "hunyuan_v1_moe: eps": Mutant("hunyuan_v1_moe", lambda config: replace(config, norm_eps=1e-2)),
    "hunyuan_v1_moe: activation": Mutant("hunyuan_v1_moe", lambda config: replace(config, activation="gelu")),
    "hunyuan_v1_moe: shares add up to one": Mutant("hunyuan_v1_moe", routed(normalized=False)),
    "hunyuan_v1_moe: sigmoid": Mutant("hunyuan_v1_moe", routed(scores="sigmoid")),
    "hunyuan_v1_moe: how many experts": Mutant("hunyuan_v1_moe", lambda config: replace(config, top_k=(2, 2))),
    "hunyuan_v1_moe: of which layer": Mutant(
        "hunyuan_v1_moe-layers-bias", lambda config: replace(config, top_k=(4, 4))
    ),
    "hunyuan_v1_moe: alpha": Mutant("hunyuan_v1_moe-alpha-tied", of_ropes(theta=200.0)),
}
