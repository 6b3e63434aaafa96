"""Where each weight of a model is found in a checkpoint: by its own name, but for the exceptions named here."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Source:
    """A checkpoint tensor that a weight comes from.

    transpose: the tensor is stored `[in, out]`.
    part, parts: the weight is the part-th of `parts` equal pieces along the tensor's out axis.
    """

    name: str
    transpose: bool = False
    part: int = 0
    parts: int = 1

    def shape(self, weight: tuple[int, ...]) -> tuple[int, ...]:
        """Of the tensor, by that of the weight."""
        whole = (weight[0] * self.parts, *weight[1:])
        return whole[::-1] if self.transpose else whole


@dataclass(frozen=True)
class WeightMap:
    """How an architecture's checkpoints differ from its module tree.

    source: the tensor of a weight (itself by default).
    prefix: what all names of a checkpoint saved without its head lack.
    ignored: patterns of tensors that checkpoints carry and the arithmetic does not need, matched in full.
    embedding, head: the two weights that are one where the model is tied; a file may then have either, or both.
    """

    source: Callable[[str], Source] = Source
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
