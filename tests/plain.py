"""Checkpoints of random weights, made without torch: sizes are free, and nothing is said of what they compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from jaxinfer.models.model import AbstractModel
from tests.checkpoints import write_tokenizer

# Heads, width and MLP are whole blocks of 128, also where they are split in two; the MLP also where in three.
CONFIG = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


def random_tensors(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """As a checkpoint of this configuration has them."""
    rng = np.random.default_rng(0)
    model = AbstractModel.from_config(config, "float32")
    made: dict[str, np.ndarray] = {}
    for name, spec in model.params.items():
        for tensor, shape in spec.source.tensors(spec.shape).items():
            if tensor not in made:
                values = rng.standard_normal(shape).astype(np.float32)
                made[tensor] = values * np.float32(0.1) + name.endswith(("norm.weight", "layer_scalar"))
    return made


def write_checkpoint(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    """A folder that loads."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / "model.safetensors")
    write_tokenizer(folder)
    return folder
