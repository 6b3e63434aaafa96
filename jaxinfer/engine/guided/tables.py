"""A grammar that is regular and small, as a table that the device follows by itself."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxinfer.sampling.table_sizes import BLOCK

ENDED, BEGIN = 0, 1  # states: the text is complete; its beginning
MOST = 32  # tokens that are looked ahead
LOST = -1  # in place of a state: what came is not in the table


@dataclass(frozen=True, eq=False)
class GrammarTable:
    """States of a grammar, S of them, and where tokens lead; C classes of tokens.

    masks: u32[S, V/32], a bit for each token that may come.
    classes: u16[V, padded as masks are].
    next: u16[S, C], for tokens that may come.
    ends: u8[S], GOES_ON, FORCED or COMPLETE.
    tails: the tokens that are left, of states that are FORCED.
    longest: i32[S], most tokens that may come before a state that is FORCED or COMPLETE; MOST where that
        are as many or more.
    """

    masks: np.ndarray
    classes: np.ndarray
    next: np.ndarray
    ends: np.ndarray
    tails: dict[int, list[int]]
    longest: np.ndarray

    @property
    def nbytes(self) -> int:
        """Nearly all of it."""
        return self.masks.nbytes + self.classes.nbytes + self.next.nbytes

    @property
    def blocks(self) -> int:
        """How many of the device's it takes."""
        return -(-len(self.ends) // BLOCK)

    def after(self, state: int, token: int) -> int:
        """The next state; LOST where the token may not come."""
        if state == LOST or not self.masks[state, token >> 5] >> np.uint32(token & 31) & np.uint32(1):
            return LOST
        return int(self.next[state, self.classes[token]])
