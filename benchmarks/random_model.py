"""A model of a given size with random weights in Hugging Face format: what the benchmarks run on, made in seconds."""

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

# 1.0B parameters, of which a token takes 0.18B: Qwen3-30B-A3B's layer of half its width and experts, 6 times.
QWEN3_MOE_1B = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}

# 0.34B parameters: Qwen3.5's layers, three gated delta nets for one that attends.
QWEN3_5_350M = {
    "model_type": "qwen3_5_text",
    "architectures": ["Qwen3_5ForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 16,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}

# 0.31B parameters: Mamba's layers.
MAMBA_310M = {
    "model_type": "mamba",
    "architectures": ["MambaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 1024,
    "num_hidden_layers": 40,
    "state_size": 16,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}

# Of encoders what isn't BERT-base's: MiniLM-L6's.
MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}

# Of each a folder's name, and its configuration.
MODELS = {
    "llama": ("jaxinfer-llama-350m", LLAMA_350M),
    "qwen3-moe": ("jaxinfer-qwen3-moe-1b", QWEN3_MOE_1B),
    "qwen3.5": ("jaxinfer-qwen3.5-350m", QWEN3_5_350M),
    "mamba": ("jaxinfer-mamba-310m", MAMBA_310M),
}


def write_model(folder: Path, config: dict[str, object] = LLAMA_350M, seed: int = 0) -> Path:
    """Writes the checkpoint unless it is there; a half-written one is never left behind."""
    if folder.exists():
        return folder
    building = folder.with_name(folder.name + ".building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for spec in AbstractModel.from_config(config, "float32").params.values():
        for name, shape in spec.source.tensors(spec.shape).items():
            if name not in tensors:
                noise = rng.standard_normal(shape, np.float32) * np.float32(0.02) if len(shape) > 1 else None
                tensors[name] = np.ones(shape, np.float32) if noise is None else noise
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


def words() -> list[str]:
    """A vocabulary: syllables, and letters for all else."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    syllables = [a + b + c for a in letters for b in "aeiou" for c in letters]
    return [*special, *letters, *(f"##{c}" for c in letters), *syllables, *(f"##{s}" for s in syllables[:600])]


def write_encoder(folder: Path, shape: dict[str, int], classes: int = 0, seed: int = 0) -> Path:
    """A BERT of this shape, as sentence-transformers has one that embeds, or with a head for classes."""
    if folder.exists():
        return folder
    import torch
    from tokenizers import normalizers, processors
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    building = folder.with_name(folder.name + ".building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    torch.manual_seed(seed)
    config = BertConfig(**shape, num_labels=max(classes, 1))
    model = BertForSequenceClassification(config) if classes else BertModel(config)
    model.save_pretrained(building)
    vocab = {word: i for i, word in enumerate(words())}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ends)
    tokenizer.save(str(building / "tokenizer.json"))
    names = {f"{kind}_token": f"[{kind.upper()}]" for kind in ("pad", "unk", "cls", "sep", "mask")}
    settings = {"tokenizer_class": "BertTokenizerFast", "model_max_length": 512, "do_lower_case": True}
    (building / "tokenizer_config.json").write_text(json.dumps(names | settings))
    if not classes:
        kinds = ("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")
        modules = [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (kind, path) in enumerate(kinds)
        ]
        (building / "modules.json").write_text(json.dumps(modules))
        (building / "sentence_bert_config.json").write_text('{"max_seq_length": 512, "do_lower_case": false}')
        (building / "1_Pooling").mkdir()
        (building / "2_Normalize").mkdir()
        pooling = {"word_embedding_dimension": config.hidden_size, "pooling_mode_mean_tokens": True}
        (building / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    building.rename(folder)
    return folder
