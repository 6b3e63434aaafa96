"""Where a config.json says one thing and the tensors beside it are another: the tensors count.

Decided before anything is planned or loaded, so that all who ask for the model get the same one.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxinfer.checkpoint.bitsandbytes import STATE, STATE_BYTES, read_state
from jaxinfer.checkpoint.folder import Checkpoint
from jaxinfer.checkpoint.load import FLOATS
from jaxinfer.checkpoint.open import Weights
from jaxinfer.models.declared import Declarations
from jaxinfer.models.tasks import GENERATE, wanted_task
from jaxinfer.models.weights import ParamMapping
from jaxinfer.models.wrapped import untied
from jaxinfer.quantization.stored import BLOCK_SIZE, TABLE, leaving, respelled, stored_quantization

BLOCK = 2**22  # elements that are compared at a time
PACKED = ("qweight", "weight_packed")  # what a quantized linear has in place of `weight`

log = logging.getLogger("jaxinfer")


def as_stored(config: Mapping[str, Any], weights: Weights, declarations: Declarations | None = None) -> dict[str, Any]:
    """A config.json's content as it would be, had it been written for these weights.

    `tie_word_embeddings` is false where there is a head with values of its own; what was saved twice, or as the head
    alone, stays tied. Quantized linears are those that have such tensors, however config.json names the others; and
    what bitsandbytes says beside them counts. declarations: of earlier starts. Raises ValueError for a config.json
    that is none.
    """
    content = dict(config)
    declared = (declarations or Declarations()).config(config)
    names = declared.weights
    makes_text = wanted_task(config) == GENERATE  # a head for words is for that alone
    if makes_text and declared.config.tie_word_embeddings and _has_own_head(weights, names):
        content = untied(content)
        log.warning("%s: has a head of its own, which is used, although config.json ties it", weights.folder)
    stored = stored_quantization(config) if isinstance(weights, Checkpoint) else None
    if stored is not None and isinstance(weights, Checkpoint):
        content = _as_named(content, weights, names)
        stored = stored_quantization(content) or stored
        plain, packed = _linears(weights, names, stored.tables)
        as_said = all(stored.format_of(name, "Linear") is None for name in plain)
        if not as_said or any(stored.format_of(name, "Linear") is None for name in packed):
            content = leaving(content, plain)
    return content


def _has_own_head(weights: Weights, names: ParamMapping) -> bool:
    if not isinstance(weights, Checkpoint):
        return names.head in weights.tensors
    heads = names.spellings(names.head)
    if any(head.removesuffix("weight") + suffix in weights.tensors for head in heads for suffix in PACKED):
        return True
    head, embedding = (
        next((weights.tensors[n] for n in spellings if n in weights.tensors), None)
        for spellings in (heads, names.spellings(names.embedding))
    )
    if head is None or embedding is None:
        return False
    if head.shape != embedding.shape or not {head.dtype, embedding.dtype} <= set(FLOATS) or len(head.shape) != 2:
        return True
    count = max(BLOCK // max(head.shape[1], 1), 1)
    for start in range(0, head.shape[0], count):
        rows = slice(start, min(start + count, head.shape[0])), slice(0, head.shape[1])
        head_rows, embedding_rows = (weights.read(info.name, rows).astype(np.float32) for info in (head, embedding))
        if not np.array_equal(head_rows, embedding_rows, equal_nan=True):
            return True
    return False


def _as_named(config: Mapping[str, Any], weights: Checkpoint, names: ParamMapping) -> dict[str, Any]:
    """With bitsandbytes' kind and block size as the first linear has them, and modules by their names here."""
    state = next(
        (name for name in weights.tensors if STATE in name and weights.tensors[name].nbytes <= STATE_BYTES), ""
    )
    said: dict[str, Any] = {}
    if state:
        try:
            size = read_state(weights.read(state)).get("blocksize")
        except ValueError as error:
            raise ValueError(f"{weights.folder}: {state.partition(f'.{STATE}')[0]}: {error}") from None
        said = {TABLE: state.rpartition(STATE)[2], BLOCK_SIZE: size}
    return respelled(config, said, lambda name: names.own(f"{name}.weight").removesuffix(".weight"))


def _linears(weights: Checkpoint, names: ParamMapping, tables: bool) -> tuple[list[str], list[str]]:
    """The linears that are floats, and those that are quantized, by their names in the model."""
    plain: list[str] = []
    packed: list[str] = []
    for name, info in weights.tensors.items():
        kind = name.rpartition(".")[2]
        if kind not in ("weight", *PACKED) or len(info.shape) != 2 or names.is_ignored(name):
            continue
        module = names.own(name).removesuffix(f".{kind}")
        if tables or f"{module}.weight" != names.embedding:
            floats = kind == "weight" and info.dtype in FLOATS and f"{name}.absmax" not in weights.tensors
            (plain if floats else packed).append(module)
    return plain, packed
