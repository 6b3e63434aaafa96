"""Tiny random checkpoints in Hugging Face format, with what transformers computes on them.

They are made by transformers and torch where those are installed, and kept in $JAXINFER_TEST_CHECKPOINTS (if set), so
that a lane without torch can use what another lane made.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

VOCAB = 300
PROMPTS = (5, 33, 70)  # tokens
NEW_TOKENS = 64

BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


class Variant(NamedTuple):
    """A checkpoint: transformers' config class, its fields, and how the saved folder is changed afterwards."""

    config: str
    fields: dict[str, Any]
    change: Callable[[Path], None] | None = None
    shard_size: str = "5GB"


def old_spelling(folder: Path) -> None:
    """What transformers 4 wrote: rope_theta and rope_scaling, torch_dtype, and the rotary frequencies as tensors."""
    config = json.loads((folder / "config.json").read_text())
    parameters = config.pop("rope_parameters")
    config["rope_theta"] = parameters.pop("rope_theta")
    kind = parameters.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **parameters}
    config["torch_dtype"] = config.pop("dtype", "float32")
    config["transformers_version"] = "4.40.0"
    (folder / "config.json").write_text(json.dumps(config))
    with_tensors(folder, {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32) for i in range(2)})


def old_gpt2(folder: Path) -> None:
    """The hub's gpt2: no prefix, causal masks as attn.bias, the tied head stored a second time."""
    from safetensors.numpy import load_file, save_file

    file = folder / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    tensors["lm_head.weight"] = tensors["wte.weight"].copy()
    for i in range(2):
        tensors[f"h.{i}.attn.bias"] = np.tril(np.ones((1, 1, 256, 256), np.float32))
        tensors[f"h.{i}.attn.masked_bias"] = np.array(-1e4, np.float32)
    save_file(tensors, file)


def tied_head_twice(folder: Path) -> None:
    from safetensors.numpy import load_file

    tensors = load_file(folder / "model.safetensors")
    with_tensors(folder, {"lm_head.weight": tensors["model.embed_tokens.weight"]})


def said_to_be_tied(folder: Path) -> None:
    """A head that was trained, and a config.json that ties it all the same."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))


def head_alone(folder: Path) -> None:
    """A tied model of which the head was saved."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors")


def with_tensors(folder: Path, more: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import load_file, save_file

    file = folder / "model.safetensors"
    save_file({**load_file(file), **more}, file)


YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS: dict[str, Variant] = {
    "llama": Variant("LlamaConfig", BASE),
    "llama-sharded-mha-tied": Variant(
        "LlamaConfig", BASE | {"num_key_value_heads": 4, "tie_word_embeddings": True}, shard_size="20KB"
    ),
    "llama-bias-head_dim-gelu": Variant(
        "LlamaConfig", BASE | {"attention_bias": True, "mlp_bias": True, "head_dim": 16, "hidden_act": "gelu"}
    ),
    "llama-old-spelling": Variant("LlamaConfig", BASE | rope("linear", factor=2.0), old_spelling),
    "llama-old-tied-twice": Variant("LlamaConfig", BASE | {"tie_word_embeddings": True}, tied_head_twice),
    "llama-said-to-be-tied": Variant("LlamaConfig", BASE, said_to_be_tied),
    "llama-tied-head-alone": Variant("LlamaConfig", BASE | {"tie_word_embeddings": True}, head_alone),
    "llama-linear": Variant("LlamaConfig", BASE | rope("linear", factor=4.0)),
    "llama-llama3": Variant("LlamaConfig", BASE | rope("llama3", **LLAMA3)),
    "llama-yarn": Variant("LlamaConfig", BASE | rope("yarn", **YARN)),
    "llama-yarn-mscale": Variant(
        "LlamaConfig", BASE | rope("yarn", **YARN, mscale=0.7, mscale_all_dim=0.4, beta_fast=24, truncate=False)
    ),
    "llama-dynamic": Variant("LlamaConfig", BASE | rope("dynamic", factor=2.0)),
    "mistral": Variant("MistralConfig", BASE | {"sliding_window": None, "head_dim": 12}),
    "mistral-window": Variant("MistralConfig", BASE | {"sliding_window": 20}),
    "qwen2": Variant("Qwen2Config", BASE),
    "qwen2-window-tied": Variant(
        "Qwen2Config",
        BASE | {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3": Variant("Qwen3Config", BASE | {"head_dim": 16}),
    "qwen3-layer_types-bias": Variant(
        "Qwen3Config",
        BASE
        | {
            "head_dim": 8,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "gpt2": Variant("GPT2Config", GPT2),
    "gpt2-old": Variant("GPT2Config", GPT2, old_gpt2),
    "gpt2-untied-scaled": Variant(
        "GPT2Config",
        GPT2
        | {
            "n_inner": 40,
            "activation_function": "relu",
            "scale_attn_by_inverse_layer_idx": True,
            "tie_word_embeddings": False,
        },
    ),
}


class Reference(NamedTuple):
    """A checkpoint's folder and what transformers computes on it in float32.

    prompts: ids. logits: of the longest prompt, [tokens, V]. greedy: NEW_TOKENS ids a prompt. gaps: how far apart the
    two best logits were at each of them.
    """

    folder: Path
    prompts: list[list[int]]
    logits: np.ndarray
    greedy: list[list[int]]
    gaps: np.ndarray


class Checkpoints:
    """Makes and finds the variants below one folder."""

    def __init__(self, root: str | os.PathLike[str]):
        self.root = Path(root)

    def __call__(self, name: str) -> Reference:
        folder = self.root / name
        if not folder.exists():
            pytest.importorskip("torch", reason="torch makes the reference checkpoints")
            _make(VARIANTS[name], folder)
        data = np.load(folder / "reference.npz")
        prompts = [data[f"prompt{i}"].tolist() for i in range(len(PROMPTS))]
        return Reference(folder, prompts, data["logits"], data["greedy"].tolist(), data["gaps"])


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer: 256 bytes and an end-of-text token that no model here emits on purpose."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    config = {"eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _make(variant: Variant, folder: Path) -> None:
    import torch
    import transformers

    torch.manual_seed(1)
    config = getattr(transformers, variant.config)(**variant.fields, bos_token_id=None, eos_token_id=None)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    with torch.no_grad():
        for weight in model.parameters():
            # Larger than models start with: attention must matter, and the best tokens must be apart.
            weight.copy_(torch.randn_like(weight) * (0.3 if weight.ndim > 1 else 0.2) + (weight.ndim == 1))
        rng = np.random.default_rng(2)
        prompts = [rng.integers(0, VOCAB, n) for n in PROMPTS]
        arrays = {f"prompt{i}": prompt for i, prompt in enumerate(prompts)}
        arrays["logits"] = model(torch.tensor(prompts[-1][None])).logits[0].numpy()
        greedy, gaps = [], []
        for prompt in prompts:
            ids = torch.tensor(prompt[None])
            whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
            best = model(whole).logits[0, len(prompt) - 1 : -1].topk(2).values
            greedy.append(whole[0, len(prompt) :].numpy())
            gaps.append((best[:, 0] - best[:, 1]).numpy())
    with building(folder) as own:
        model.save_pretrained(own, max_shard_size=variant.shard_size)
        write_tokenizer(own)
        np.savez(own / "reference.npz", **arrays, greedy=np.array(greedy), gaps=np.array(gaps))
        if variant.change is not None:
            variant.change(own)


@contextlib.contextmanager
def building(folder: Path) -> Iterator[Path]:
    """Where to write what becomes `folder` all at once. Another process may make the same, and be first."""
    own = folder.with_name(f"{folder.name}.{os.getpid()}")
    shutil.rmtree(own, ignore_errors=True)
    yield own
    try:
        own.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        shutil.rmtree(own)


def same_tokens(ours: list[int], reference: list[int], gaps: np.ndarray) -> bool:
    """Equal, or different only from a place on where the reference's two best logits lie within 1e-4."""
    for i, (a, b) in enumerate(zip(ours, reference, strict=True)):
        if a != b:
            return bool(gaps[i] < 1e-4)
    return True
