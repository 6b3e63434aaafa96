"""Copies of states that sequences can go on from: which slot has which, of what is beside the slots of running rows.

A state is known by all tokens that it has seen, and by no fewer: by the key of the full pages among them, and the few
tokens after those.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

Rest = tuple[int, ...]  # tokens after the last full page
RECENT = 2**16  # keys of pages that are remembered where there are no pages


class Snapshots:
    """Hands out slots for copies: one that is blank, or else that of the copy which was not used for longest."""

    def __init__(self, slots: range):
        self.slots = slots
        self.reset()

    def reset(self) -> None:
        """Forgets all of them."""
        self._blank = list(reversed(self.slots))
        self._place: OrderedDict[int, tuple[bytes, Rest]] = OrderedDict()  # of each slot: least recently used first
        self._after: dict[bytes, dict[Rest, int]] = {}

    @property
    def used(self) -> int:
        """Slots with a copy."""
        return len(self._place)

    def after(self, key: bytes) -> Mapping[Rest, int]:
        """The copies that have seen the pages up to this key and less than a page more, by what that is."""
        return self._after.get(key, {})

    def use(self, slot: int) -> None:
        """Somebody goes on from it."""
        self._place.move_to_end(slot)

    def put(self, key: bytes, rest: Rest = ()) -> int | None:
        """The slot that a copy is to be made in; None if it is known already."""
        if (known := self.after(key).get(rest)) is not None:
            self.use(known)
            return None
        if self._blank:
            slot = self._blank.pop()
        else:
            slot, (old, other) = self._place.popitem(last=False)
            del self._after[old][other]
            if not self._after[old]:
                del self._after[old]
        self._place[slot] = key, rest
        self._after.setdefault(key, {})[rest] = slot
        return slot


class RecentKeys:
    """What was seen lately, where no page remembers it."""

    def __init__(self, most: int = RECENT):
        self._most = most
        self._keys: OrderedDict[bytes, None] = OrderedDict()

    def __contains__(self, key: bytes) -> bool:
        return key in self._keys

    def add(self, key: bytes) -> None:
        """One more, or one once more."""
        self._keys[key] = None
        self._keys.move_to_end(key)
        if len(self._keys) > self._most:
            self._keys.popitem(last=False)
