import json
from dataclasses import replace
from pathlib import Path

from tests.models.families import BASE, Mutant, Variant
from tests.models.families.gemma import SMALL, YARN, sparse

FULL, SLIDING = "full_attention", "sliding_attention"
TYPED = BASE | {"head_dim": 16, "query_pre_attn_scalar": 6, "sliding_window": 12}


def ropes(full: dict, sliding: dict) -> dict:
    return {"rope_parameters": {FULL: full, SLIDING: sliding}}


def default(theta: float) -> dict:
    return {"rope_type": "default", "rope_theta": theta}


def linear(theta: float) -> dict:
    return {"rope_type": "linear", "rope_theta": theta, "factor": 8.0}


def old_spelling(folder: Path) -> None:
    """What transformers 4 wrote."""
    path = folder / "config.json"
    data = json.loads(path.read_text())
    full, sliding = (data["rope_parameters"][name] for name in (FULL, SLIDING))
    data["rope_theta"], data["rope_local_base_freq"] = full.pop("rope_theta"), sliding.pop("rope_theta")
    data["rope_scaling"] = full
    pattern = data["layer_types"].index(FULL) + 1
    for name in ("rope_parameters", "layer_types", "_sliding_window_pattern"):
        data.pop(name, None)
    path.write_text(json.dumps(data | {"sliding_window_pattern": pattern}))


VARIANTS = {
    "gemma3_text": Variant("Gemma3TextConfig", TYPED | {"num_hidden_layers": 7} | ropes(linear(1e6), default(1e4))),
    "gemma3_text-old": Variant(
        "Gemma3TextConfig",
        TYPED | {"num_hidden_layers": 3, "sliding_window_pattern": 2} | ropes(linear(1e5), default(500.0)),
        old_spelling,
    ),
    "gemma3_text-bias-tied-silu-layer_types-capped": Variant(
        "Gemma3TextConfig",
        TYPED
        | ropes(YARN, linear(2e3))
        | {
            "attention_bias": True,
            "tie_word_embeddings": True,
            "hidden_activation": "silu",
            "layer_types": [FULL, SLIDING],
            "final_logit_softcapping": 4.0,
        },
    ),
    "gemma3_text-sparse": Variant(
        "Gemma3TextConfig", SMALL | {"num_hidden_layers": 6}, sparse("Gemma3TextConfig", "layer_types")
    ),
}
CAPPED = "gemma3_text-bias-tied-silu-layer_types-capped"


def changed(of_type: str, **changes: object):
    """The rotary embedding of a type of layer, in the variant of two layers."""

    def change(config):
        full, sliding = config.ropes
        return replace(
            config,
            ropes=(replace(full, **changes), sliding) if of_type == FULL else (full, replace(sliding, **changes)),
        )

    return change


MUTANTS = {
    "gemma3: norm_offset": Mutant(CAPPED, lambda config: replace(config, norm_offset=0.0)),
    "gemma3: embedding_scale": Mutant(CAPPED, lambda config: replace(config, embedding_scale=1.0)),
    "gemma3: activation": Mutant(CAPPED, lambda config: replace(config, activation="gelu")),
    "gemma3: eps": Mutant(CAPPED, lambda config: replace(config, norm_eps=1e-2)),
    "gemma3: query_pre_attn_scalar": Mutant(CAPPED, lambda config: replace(config, scale=16**-0.5)),
    "gemma3: final_logit_softcapping": Mutant(CAPPED, lambda config: replace(config, logit_soft_cap=None)),
    "gemma3: window": Mutant(CAPPED, lambda config: replace(config, windows=(None, 13))),
    "gemma3: which layers slide": Mutant(CAPPED, lambda config: replace(config, windows=(12, None))),
    "gemma3: ropes of the types": Mutant(CAPPED, lambda config: replace(config, ropes=config.ropes[::-1])),
    "gemma3: scaling of full layers": Mutant(CAPPED, changed(FULL, kind="default")),
    "gemma3: scaling of sliding layers": Mutant(CAPPED, changed(SLIDING, kind="default")),
    "gemma3: theta of full layers": Mutant(CAPPED, changed(FULL, theta=5e3)),
    "gemma3: theta of sliding layers": Mutant(CAPPED, changed(SLIDING, theta=1e4)),
    "gemma3: default windows": Mutant(
        "gemma3_text-sparse", lambda config: replace(config, windows=(40,) * 5 + config.windows[5:])
    ),
    "gemma3: pattern": Mutant(
        "gemma3_text", lambda config: replace(config, windows=config.windows[1:] + config.windows[:1])
    ),
}
