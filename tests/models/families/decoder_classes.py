"""Decoders that make vectors and classes: their bodies, and transformers' own head for classes."""

import json
from dataclasses import replace

from tests.checkpoints import GPT2
from tests.models.families import BASE, BODY, CLASSES, Mutant, Variant
from tests.models.families.bert import THREE, head
from tests.models.families.gemma3 import TYPED, default, linear, ropes
from tests.models.families.opt import FIELDS as OPT

PADDED = BASE | THREE | {"pad_token_id": 54}  # a text ends with it
BOTH_WAYS = TYPED | {"num_hidden_layers": 3, "sliding_window_pattern": 2, "use_bidirectional_attention": True}


def as_made(folder):
    """Transformers saves the half of a window, of which it would take the half again."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sliding_window": 12}))


VARIANTS = {
    "llama-classes": Variant("LlamaConfig", PADDED, auto=CLASSES),
    "mistral-classes": Variant("MistralConfig", PADDED | {"sliding_window": 9}, auto=CLASSES),
    "qwen2-classes": Variant("Qwen2Config", BASE | THREE, auto=CLASSES),
    "qwen3-classes": Variant("Qwen3Config", PADDED | {"head_dim": 16, "tie_word_embeddings": True}, auto=CLASSES),
    "gemma-classes": Variant("GemmaConfig", PADDED | {"head_dim": 16}, auto=CLASSES),
    "gpt2-classes": Variant("GPT2Config", GPT2 | THREE, auto=CLASSES),
    "opt-classes": Variant("OPTConfig", OPT | THREE | {"word_embed_proj_dim": 24}, auto=CLASSES),
    "qwen3": Variant("Qwen3Config", BASE | {"head_dim": 16}, auto=BODY),
    "gemma3_text-both": Variant("Gemma3TextConfig", BOTH_WAYS | ropes(linear(1e5), default(500.0)), as_made, auto=BODY),
    "gemma3_text-classes": Variant(
        "Gemma3TextConfig", TYPED | THREE | ropes(default(1e4), default(500.0)), auto=CLASSES
    ),
}
MUTANTS = {
    "llama: which token": Mutant("llama-classes", head(pooling="lasttoken")),
    "llama: padding": Mutant("llama-classes", head(padding_id=None)),
    "gemma3: both ways": Mutant("gemma3_text-both", lambda config: replace(config, causal=True)),
    "gemma3: half a window": Mutant("gemma3_text-both", lambda config: replace(config, windows=(8, None, 8))),
    "gemma3: window's end": Mutant("gemma3_text-both", lambda config: replace(config, windows=(6, None, 6))),
}
