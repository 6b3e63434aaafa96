"""What stays on the devices from one call to the next."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import jax

from jaxinfer.cache import Cache
from jaxinfer.sampling.slots import DecodeState
from jaxinfer.weights import LowRank


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What a call changes or reads. A program has None for the parts that it does not take.

    cache: pages and slots of all layers.
    slots: what there is of each sequence that runs.
    hidden: `[T, D]`, the hidden states of the last forward.
    adapters: what those in slots do to weights, by name; the same on all shards of rows.
    """

    cache: Cache = None  # type: ignore[assignment]
    slots: DecodeState = None  # type: ignore[assignment]
    hidden: jax.Array = None  # type: ignore[assignment]
    adapters: Mapping[str, LowRank] = None  # type: ignore[assignment]

    def only(self, parts: Collection[str]) -> State:
        """These parts of it, by name."""
        return State(**{part: getattr(self, part) for part in parts})

    def updated(self, parts: State) -> State:
        """With the parts that are there in place of its own."""
        there = {part: value for part, value in vars(parts).items() if value is not None}
        return replace(self, **there)
