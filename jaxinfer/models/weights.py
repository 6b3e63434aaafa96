"""Where each weight of a model is found in a checkpoint: by its own name, but for the exceptions named here."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from jaxinfer.models.sources import Source, Tensor


@dataclass(frozen=True)
class ParamMapping:
    """How an architecture's checkpoints differ from its module tree.

    source: the tensors of a weight (one of its own name by default).
    prefix: what all names of a checkpoint saved without its head lack.
    ignored: patterns of tensors that checkpoints carry and the arithmetic does not need, matched in full.
    embedding, head: the two weights that are one where the model is tied; a file may then have either, or both.
    """

    source: Callable[[str], Source] = Tensor
    prefix: str = "model."
    ignored: tuple[str, ...] = field(default=())
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"

    def spellings(self, name: str) -> tuple[str, ...]:
        """The names that a tensor may have in a file."""
        return tuple(dict.fromkeys((name, name.removeprefix(self.prefix))))

    def is_ignored(self, name: str) -> bool:
        name = name.removeprefix(self.prefix)
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)
