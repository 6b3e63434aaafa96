"""A Llama of a given size with random weights in Hugging Face format: what the benchmarks run on, made in seconds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jaxinfer.models.model import AbstractModel

# 0.35B parameters: 24 layers, untied head.
LLAMA_350M = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def write_model(folder: Path, config: dict[str, object] = LLAMA_350M, seed: int = 0) -> Path:
    """Writes the checkpoint unless it is there; a half-written one is never left behind."""
    if folder.exists():
        return folder
    building = folder.with_name(folder.name + ".building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    tensors = {
        name: rng.standard_normal(shape.shape, np.float32) * np.float32(0.02)
        if len(shape.shape) > 1
        else np.ones(shape.shape, np.float32)
        for name, shape in AbstractModel.from_config(config, "float32").abstract.items()
    }
    save_file(tensors, building / "model.safetensors", metadata={"format": "pt"})
    (building / "config.json").write_text(json.dumps(config))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(building / "tokenizer.json"))
    (building / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    building.rename(folder)
    return folder
