import json
from dataclasses import replace

import numpy as np

from tests.models.families import BASE, Mutant, Variant

FIELDS = {name: value for name, value in BASE.items() if name != "num_key_value_heads"}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}


def older(folder):
    """As transformers 4 and before wrote it."""
    from safetensors.numpy import load_file, save_file

    config = json.loads((folder / "config.json").read_text())
    parameters = config.pop("rope_parameters")
    config |= {"rotary_pct": parameters["partial_rotary_factor"], "rotary_emb_base": parameters["rope_theta"]}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):
        parent = f"gpt_neox.layers.{layer}.attention"
        tensors |= {
            f"{parent}.bias": np.tril(np.ones((1, 1, 256, 256), bool)),
            f"{parent}.masked_bias": np.full(1, -1e9, np.float32),
            f"{parent}.rotary_emb.inv_freq": np.ones(1, np.float32),
        }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


VARIANTS = {
    "gpt_neox": Variant("GPTNeoXConfig", FIELDS),
    "gpt_neox-older": Variant("GPTNeoXConfig", FIELDS | {"rotary_pct": 0.5, "rotary_emb_base": 1000}, older),
    "gpt_neox-sequential-tied": Variant(
        "GPTNeoXConfig",
        FIELDS
        | {"use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True, "hidden_act": "relu"},
    ),
    "gpt_neox-yarn": Variant(
        "GPTNeoXConfig", FIELDS | {"max_position_embeddings": 128, "rope_parameters": YARN, "rotary_pct": 1.0}
    ),
}
MUTANTS = {
    "gpt_neox: eps": Mutant("gpt_neox", lambda config: replace(config, norm_eps=1e-2)),
    "gpt_neox: activation": Mutant("gpt_neox", lambda config: replace(config, activation="silu")),
    "gpt_neox: sequential": Mutant("gpt_neox", lambda config: replace(config, parallel=False)),
    "gpt_neox: parallel": Mutant("gpt_neox-sequential-tied", lambda config: replace(config, parallel=True)),
    "gpt_neox: all of a head turns": Mutant(
        "gpt_neox", lambda config: replace(config, ropes=(replace(config.ropes[0], dim=8),) * 2)
    ),
    "gpt_neox: theta": Mutant(
        "gpt_neox-older", lambda config: replace(config, ropes=(replace(config.ropes[0], theta=1e4),) * 2)
    ),
    "gpt_neox: yarn": Mutant(
        "gpt_neox-yarn", lambda config: replace(config, ropes=(replace(config.ropes[0], kind="default"),) * 2)
    ),
}
