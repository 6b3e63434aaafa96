"""Tables of vectors instead of a transformer: the folders of model2vec and of sentence-transformers' StaticEmbedding.

The first have a tensor `embeddings`, and perhaps `mapping`, which row each token has, and `weights`, a factor of each
token; the others `embedding.weight`. Formats: model2vec up to 0.10, sentence-transformers up to 6.2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jaxinfer.checkpoint.files import read_json, some
from jaxinfer.checkpoint.folder import Checkpoint
from jaxinfer.errors import CheckpointError
from jaxinfer.models.registry import STATIC

Json = dict[str, Any]
OWN, THEIRS = "embeddings", "embedding.weight"
MAPPING, FACTORS = "mapping", "weights"


def static_config(folder: Path) -> Json:
    """What a config.json would say, if there were one that did. Raises CheckpointError."""
    with Checkpoint(folder) as checkpoint:
        shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    tables = [name for name in (OWN, THEIRS) if name in shapes]
    known = (OWN, MAPPING, FACTORS) if tables == [OWN] else (THEIRS,)
    if len(tables) != 1 or len(shapes[tables[0]]) != 2 or shapes.keys() - set(known):
        raise CheckpointError(
            f"{folder}: has the tensors {some(sorted(shapes))}: a table of vectors is {THEIRS}, or {OWN} [rows, D], "
            f"which may have {MAPPING} and {FACTORS} beside it"
        )
    rows, size = shapes[tables[0]]
    tokens = {shapes[name] for name in (MAPPING, FACTORS) if name in shapes} or {(rows,)}
    if len(tokens) != 1 or len(next(iter(tokens))) != 1 or (MAPPING not in shapes and tokens != {(rows,)}):
        raise CheckpointError(f"{folder}: {MAPPING} and {FACTORS} must have one number of each token")
    return {
        "architectures": ["StaticModel"],
        "model_type": STATIC,
        "vocab_size": next(iter(tokens))[0],
        "hidden_size": size,
        "dtype": "float32",
    }


def read_table(checkpoint: Checkpoint) -> np.ndarray[Any, Any]:
    """The vector of each token, float32 `[tokens, D]`. Raises CheckpointError for a mapping to rows that are not
    there."""
    own = OWN in checkpoint.tensors
    table = checkpoint.read(OWN if own else THEIRS).astype(np.float32)
    if own and MAPPING in checkpoint.tensors:
        mapping = checkpoint.read(MAPPING).astype(np.int64)
        if mapping.size and not 0 <= mapping.min() <= mapping.max() < len(table):
            raise CheckpointError(f"{checkpoint.folder}: {MAPPING} has rows beyond the {len(table)} that there are")
        table = table[mapping]
    if own and FACTORS in checkpoint.tensors:
        table = table * checkpoint.read(FACTORS).astype(np.float32)[:, None]
    return table


def unknown_token(folder: Path) -> int | None:
    """The id of what the tokenizer doesn't know, which model2vec leaves out of texts."""
    model = read_json(folder / "tokenizer.json").get("model")
    if not isinstance(model, dict):
        return None
    token, unknown, vocab = model.get("unk_token"), model.get("unk_id"), model.get("vocab")
    if isinstance(token, str) and isinstance(vocab, dict):
        unknown = vocab.get(token)
    return unknown if isinstance(unknown, int) else None
