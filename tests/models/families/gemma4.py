import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.models.families import BASE, Mutant, Variant
from tests.models.families.mixtral import routed

FULL, SLIDING = "full_attention", "sliding_attention"
PATTERN = [SLIDING, FULL]
PROPORTIONAL = {"rope_type": "proportional", "partial_rotary_factor": 0.4, "rope_theta": 2000.0, "factor": 2.0}
ROPES = {"rope_parameters": {FULL: PROPORTIONAL, SLIDING: {"rope_type": "default", "rope_theta": 500.0}}}
HEADS = {"head_dim": 8, "global_head_dim": 16, "sliding_window": 12}
INPUTS = {"hidden_size_per_layer_input": 6, "vocab_size_per_layer_input": 310}
NO_INPUTS = {"hidden_size_per_layer_input": 0}
FEWER = {"num_hidden_layers": 4, "layer_types": PATTERN * 2, "num_kv_shared_layers": 2}
SHARED = {"num_hidden_layers": 6, "layer_types": PATTERN * 3, "num_kv_shared_layers": 3}
EXPERTS = {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 3, "moe_intermediate_size": 24}
KEYS_AS_VALUES = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
CAPPED = {"final_logit_softcapping": 4.0}


def as_on_the_hub(folder: Path) -> None:
    """Heads of full layers by fields of their own, not layer by layer, and tensors that nothing reads."""
    path = folder / "config.json"
    data = json.loads(path.read_text())
    own = next(iter(data.pop("per_layer_config").values()))
    data["global_head_dim"], data["num_global_key_value_heads"] = own["head_dim"], own.get("num_key_value_heads")
    path.write_text(json.dumps(data))
    tensors = load_file(folder / "model.safetensors")
    for i in range(data["num_hidden_layers"] - data["num_kv_shared_layers"], data["num_hidden_layers"]):
        for name in ("k_proj", "v_proj", "k_norm", "v_norm"):
            tensors[f"model.layers.{i}.self_attn.{name}.weight"] = np.ones((2, 3), np.float32)
    save_file(tensors, folder / "model.safetensors")


def without_layer_types(folder: Path) -> None:
    path = folder / "config.json"
    data = json.loads(path.read_text())
    del data["layer_types"]
    path.write_text(json.dumps(data))


def sparse(config_class: str):
    """Fields that have the default value are left out."""

    def change(folder: Path) -> None:
        import transformers

        default = getattr(transformers, config_class)().to_dict()
        path = folder / "config.json"
        data = json.loads(path.read_text())
        kept = {name: value for name, value in data.items() if name == "model_type" or value != default.get(name, ...)}
        del kept["per_layer_config"], kept["layer_types"]
        assert len(kept) < len(data) - 15
        path.write_text(json.dumps(kept))

    return change


VARIANTS = {
    "gemma4_text": Variant(
        "Gemma4TextConfig",
        BASE | HEADS | ROPES | INPUTS | FEWER | EXPERTS | KEYS_AS_VALUES | CAPPED | {"use_double_wide_mlp": True},
    ),
    "gemma4_text-small-shared-tied-hub": Variant(
        "Gemma4TextConfig",
        BASE | HEADS | ROPES | INPUTS | SHARED | {"use_double_wide_mlp": True, "tie_word_embeddings": True},
        as_on_the_hub,
    ),
    "gemma4_text-experts-one-global-head": Variant(
        "Gemma4TextConfig",
        BASE | HEADS | ROPES | NO_INPUTS | EXPERTS | KEYS_AS_VALUES | {"layer_types": PATTERN},
        as_on_the_hub,
    ),
    "gemma4_text-bias-silu-last-full": Variant(
        "Gemma4TextConfig",
        BASE
        | HEADS
        | NO_INPUTS
        | {
            "num_hidden_layers": 3,
            "attention_bias": True,
            "hidden_activation": "silu",
            "layer_types": [FULL, SLIDING, SLIDING],
            "use_bidirectional_attention": "vision",
            "num_global_key_value_heads": 1,  # without attention_k_eq_v it says nothing
            "rope_parameters": {
                FULL: {"rope_type": "linear", "rope_theta": 300.0, "factor": 8.0},
                SLIDING: {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 100.0},
            },
        },
    ),
    "gemma4_text-sparse": Variant(
        "Gemma4TextConfig",
        {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, **INPUTS},
        sparse("Gemma4TextConfig"),
    ),
    "gemma4_text-pattern": Variant(
        "Gemma4TextConfig", BASE | HEADS | ROPES | NO_INPUTS | {"num_hidden_layers": 7}, without_layer_types
    ),
    "gemma4_unified_text": Variant(
        "Gemma4UnifiedTextConfig",
        BASE | HEADS | ROPES | SHARED | KEYS_AS_VALUES | CAPPED | {"use_double_wide_mlp": True},
    ),
    "gemma4_unified_text-sparse": Variant(
        "Gemma4UnifiedTextConfig",
        {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        sparse("Gemma4UnifiedTextConfig"),
    ),
}


def of_layers(name: str, change):
    """A mutant's change of what a configuration says of each layer."""
    return lambda config: replace(config, **{name: tuple(map(change, getattr(config, name)))})


def turned(of_kind: str, /, **changes: object):
    """The rotary embedding of layers that have it of that kind."""
    return of_layers("ropes", lambda rope: replace(rope, **changes) if rope.kind == of_kind else rope)


ALL, SMALL, MOE = "gemma4_text", "gemma4_text-small-shared-tied-hub", "gemma4_text-experts-one-global-head"
OTHER, UNIFIED = "gemma4_text-bias-silu-last-full", "gemma4_unified_text"
MUTANTS = {
    "gemma4: eps": Mutant(ALL, lambda config: replace(config, norm_eps=1e-2)),
    "gemma4: embedding_scale": Mutant(ALL, lambda config: replace(config, embedding_scale=1.0)),
    "gemma4: activation": Mutant(ALL, lambda config: replace(config, activation="relu")),
    "gemma4: final_logit_softcapping": Mutant(ALL, lambda config: replace(config, logit_soft_cap=None)),
    "gemma4: scale": Mutant(ALL, lambda config: replace(config, scale=16**-0.5)),
    "gemma4: window": Mutant(ALL, of_layers("windows", lambda window: window and window + 1)),
    "gemma4: which layers slide": Mutant(MOE, lambda config: replace(config, windows=config.windows[::-1])),
    "gemma4: dimensions that turn": Mutant(ALL, turned("proportional", turning=8)),
    "gemma4: frequencies of a part alone": Mutant(ALL, turned("proportional", theta=2000.0**0.4)),
    "gemma4: factor": Mutant(ALL, turned("proportional", factor=1.0)),
    "gemma4: theta of sliding layers": Mutant(ALL, turned("default", theta=1e4)),
    "gemma4: how many experts": Mutant(ALL, routed(top_k=4)),
    "gemma4: shares do not add up to one": Mutant(ALL, routed(normalized=False)),
    "gemma4: small, window": Mutant(SMALL, of_layers("windows", lambda window: window and window - 1)),
    "gemma4: small, whose keys": Mutant(SMALL, lambda config: replace(config, owners=(0, 1, 2, 1, 0, 1))),
    "gemma4: experts, sigmoid": Mutant(MOE, routed(scores="sigmoid")),
    "gemma4: other, scaling": Mutant(OTHER, turned("linear", kind="default")),
    "gemma4: other, last layer": Mutant(OTHER, lambda config: replace(config, windows=(None, 12, 12))),
    "gemma4: other, activation": Mutant(OTHER, lambda config: replace(config, activation="gelu")),
    "gemma4: default theta": Mutant("gemma4_text-sparse", turned("default", theta=5e5)),
    "gemma4: default turning": Mutant("gemma4_text-sparse", turned("proportional", turning=64)),
    "gemma4: default pattern": Mutant(
        "gemma4_text-pattern", lambda config: replace(config, windows=(*config.windows[:5], 12, None))
    ),
    "gemma4_unified: eps": Mutant(UNIFIED, lambda config: replace(config, norm_eps=1e-2)),
    "gemma4_unified: window": Mutant(UNIFIED, of_layers("windows", lambda window: window and window + 1)),
    "gemma4_unified: cap": Mutant(UNIFIED, lambda config: replace(config, logit_soft_cap=None)),
    "gemma4_unified: default theta": Mutant("gemma4_unified_text-sparse", turned("default", theta=5e5)),
}
