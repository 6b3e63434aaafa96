from dataclasses import replace

from tests.models.families import BASE, Mutant, Variant
from tests.models.families.gemma import SMALL, YARN, sparse

# Caps low enough to be reached.
CAPPED = {
    "head_dim": 16,
    "query_pre_attn_scalar": 6,
    "sliding_window": 20,
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 4.0,
}
UNCAPPED = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
VARIANTS = {
    "gemma2-window": Variant("Gemma2Config", BASE | CAPPED),
    "gemma2-bias-tied-silu-layer_types-uncapped": Variant(
        "Gemma2Config",
        BASE
        | CAPPED
        | UNCAPPED
        | {
            "attention_bias": True,
            "tie_word_embeddings": True,
            "hidden_activation": "silu",
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
    "gemma2-yarn-full": Variant(
        "Gemma2Config",
        BASE | CAPPED | {"layer_types": ["full_attention"] * 2, "rope_parameters": YARN},
    ),
    "gemma2-sparse": Variant("Gemma2Config", SMALL, sparse("Gemma2Config", "layer_types")),
}
MUTANTS = {
    "gemma2: norm_offset": Mutant("gemma2-window", lambda config: replace(config, norm_offset=0.0)),
    "gemma2: embedding_scale": Mutant("gemma2-window", lambda config: replace(config, embedding_scale=1.0)),
    "gemma2: activation": Mutant("gemma2-window", lambda config: replace(config, activation="silu")),
    "gemma2: eps": Mutant("gemma2-window", lambda config: replace(config, norm_eps=1e-2)),
    "gemma2: query_pre_attn_scalar": Mutant("gemma2-window", lambda config: replace(config, scale=16**-0.5)),
    "gemma2: attn_logit_softcapping": Mutant("gemma2-window", lambda config: replace(config, soft_cap=None)),
    "gemma2: final_logit_softcapping": Mutant("gemma2-window", lambda config: replace(config, logit_soft_cap=None)),
    "gemma2: uncapped scores": Mutant(
        "gemma2-bias-tied-silu-layer_types-uncapped", lambda config: replace(config, soft_cap=3.0)
    ),
    "gemma2: window": Mutant("gemma2-window", lambda config: replace(config, windows=(21, None))),
    "gemma2: which layers slide": Mutant("gemma2-window", lambda config: replace(config, windows=(None, 20))),
    "gemma2: yarn": Mutant(
        "gemma2-yarn-full", lambda config: replace(config, ropes=(replace(config.ropes[0], kind="default"),) * 2)
    ),
    "gemma2: default cap of logits": Mutant("gemma2-sparse", lambda config: replace(config, logit_soft_cap=None)),
}
