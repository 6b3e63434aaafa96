from dataclasses import replace

from tests.models.families import BASE, Mutant, Variant
from tests.models.families.mixtral import routed

EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3}
VARIANTS = {
    "olmoe": Variant("OlmoeConfig", BASE | EXPERTS),
    "olmoe-bias-clip-normalized-tied": Variant(
        "OlmoeConfig",
        BASE | EXPERTS | {"attention_bias": True, "clip_qkv": 0.5, "norm_topk_prob": True, "tie_word_embeddings": True},
    ),
}
MUTANTS = {
    "olmoe: eps": Mutant("olmoe", lambda config: replace(config, norm_eps=1e-2)),
    "olmoe: shares do not add up to one": Mutant("olmoe", routed(normalized=True)),
    "olmoe: shares add up to one": Mutant("olmoe-bias-clip-normalized-tied", routed(normalized=False)),
    "olmoe: how many experts": Mutant("olmoe", routed(top_k=2)),
    "olmoe: activation": Mutant("olmoe", lambda config: replace(config, activation="gelu")),
    "olmoe: clip": Mutant("olmoe-bias-clip-normalized-tied", lambda config: replace(config, qkv_clip=None)),
    "olmoe: rope": Mutant("olmoe", lambda config: replace(config, ropes=(None,) * 2)),
}
