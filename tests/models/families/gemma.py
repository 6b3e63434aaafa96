import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.models.families import BASE, Mutant, Variant

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
# What no checkpoint leaves to the defaults.
SMALL = {"vocab_size": BASE["vocab_size"], "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


def sparse(config: str, *derived: str) -> Any:
    """Takes out of config.json what it has by default. derived: fields that follow from others."""

    def change(folder: Path) -> None:
        import transformers

        path, default = folder / "config.json", getattr(transformers, config)().to_dict()
        data = json.loads(path.read_text())
        kept = {
            name: value
            for name, value in data.items()
            if name == "model_type" or (name not in derived and (name not in default or value != default[name]))
        }
        assert len(kept) < len(data) - 10
        path.write_text(json.dumps(kept))

    return change


def gelu(folder: Path) -> None:
    """What first releases have."""
    path = folder / "config.json"
    data = json.loads(path.read_text())
    assert data["hidden_act"] == "gelu_pytorch_tanh"
    path.write_text(json.dumps(data | {"hidden_act": "gelu", "hidden_activation": None}))


VARIANTS = {
    "gemma": Variant("GemmaConfig", BASE | {"head_dim": 16}),
    "gemma-bias-tied-silu-yarn": Variant(
        "GemmaConfig",
        BASE
        | {
            "head_dim": 8,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "hidden_act": "silu",
            "rope_parameters": YARN,
        },
    ),
    "gemma-gelu": Variant("GemmaConfig", BASE | {"head_dim": 16}, gelu),
    "gemma-sparse": Variant("GemmaConfig", SMALL, sparse("GemmaConfig")),
}
MUTANTS = {
    "gemma: norm_offset": Mutant("gemma", lambda config: replace(config, norm_offset=0.0)),
    "gemma: embedding_scale": Mutant("gemma", lambda config: replace(config, embedding_scale=1.0)),
    "gemma: activation": Mutant("gemma", lambda config: replace(config, activation="silu")),
    "gemma: eps": Mutant("gemma", lambda config: replace(config, norm_eps=1e-2)),
    "gemma: scale": Mutant("gemma", lambda config: replace(config, scale=8**-0.5)),
    "gemma: theta": Mutant(
        "gemma-sparse", lambda config: replace(config, ropes=(replace(config.ropes[0], theta=5e3),) * 2)
    ),
    "gemma: yarn": Mutant(
        "gemma-bias-tied-silu-yarn",
        lambda config: replace(config, ropes=(replace(config.ropes[0], kind="default"),) * 2),
    ),
}
