"""A tiny base and adapters of it as PEFT writes them, all of random numbers, made without torch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.plain import CONFIG, random_tensors, write_checkpoint

BASE = CONFIG | {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
TARGETS = {"self_attn": ("q_proj", "v_proj"), "mlp": ("down_proj",)}
RANK, ALPHA = 4, 8


def write_base(folder: Path) -> Path:
    return write_checkpoint(folder, BASE, {name: 3 * tensor for name, tensor in random_tensors(BASE).items()})


def write_adapter(folder: Path, seed: int, rank: int = RANK) -> Path:
    """Of `BASE`."""
    rng, tensors = np.random.default_rng(seed), {}
    width, heads, mlp = BASE["hidden_size"], BASE["head_dim"], BASE["intermediate_size"]
    sizes = {"q_proj": (width, 4 * heads), "v_proj": (width, 2 * heads), "down_proj": (mlp, width)}
    for layer in range(BASE["num_hidden_layers"]):
        for block, names in TARGETS.items():
            for name in names:
                inputs, outputs = sizes[name]
                module = f"base_model.model.model.layers.{layer}.{block}.{name}"
                for kind, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
                    tensors[f"{module}.lora_{kind}.weight"] = rng.standard_normal(shape).astype(np.float32) / 2
    folder.mkdir(parents=True)
    targets = [name for names in TARGETS.values() for name in names]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": ALPHA, "target_modules": targets, "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder
