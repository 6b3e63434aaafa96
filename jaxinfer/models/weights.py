"""Where each weight of a model is found in a checkpoint: by its own name, but for the exceptions named here."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from jaxinfer.models.sources import Source, Tensor


def spelled(name: str, names: Mapping[str, str]) -> str:
    """A name with parts of it as checkpoints have them."""
    for ours, theirs in names.items():
        name = name.replace(ours, theirs)
    return name


@dataclass(frozen=True)
class ParamMapping:
    """How an architecture's checkpoints differ from its module tree.

    source: the tensors of a weight (one of its own name by default).
    prefix: what all names of the body begin with.
    prefixes: what they begin with in other checkpoints; in those that were saved without a head, with nothing.
    head_prefixes: what comes before the head's name in other checkpoints.
    ignored: patterns of tensors that checkpoints carry and the arithmetic does not need, matched in full, after the
        prefix.
    beside: the same of tensors that belong to other parts of the model, and of their names as they are.
    embedding, head: the two weights that are one where the model is tied; a file may then have either, or both.
    """

    source: Callable[[str], Source] = Tensor
    prefix: str = "model."
    ignored: tuple[str, ...] = field(default=())
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    prefixes: tuple[str, ...] = ("",)
    head_prefixes: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()

    def spellings(self, name: str) -> tuple[str, ...]:
        """The names that a tensor may have in a file."""
        if name.startswith(self.prefix):
            rest, others = name.removeprefix(self.prefix), self.prefixes
        else:
            rest, others = name, self.head_prefixes
        return tuple(dict.fromkeys((name, *(prefix + rest for prefix in others))))

    def own(self, name: str) -> str:
        """A name in a file as it is here."""
        head = self.head.removesuffix("weight")
        for prefix in ("", *self.head_prefixes):
            if name.startswith(prefix + head):
                return name.removeprefix(prefix)
        return self.prefix + self._rest(name)

    def is_ignored(self, name: str) -> bool:
        if any(re.fullmatch(pattern, name) for pattern in self.beside):
            return True
        rest = self._rest(name)
        return any(re.fullmatch(pattern, rest) for pattern in self.ignored)

    def _rest(self, name: str) -> str:
        """Without what a name of the body begins with."""
        prefixes = (self.prefix, *self.prefixes)
        return next((name.removeprefix(prefix) for prefix in prefixes if name.startswith(prefix)), name)
