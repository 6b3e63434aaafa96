"""Which states a grammar has, if it is regular and small, and where tokens lead from each."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from jaxinfer.engine.guided.automaton import DEAD, START, Automaton, NotRegular
from jaxinfer.engine.guided.digits import digits
from jaxinfer.engine.guided.guide import Guide
from jaxinfer.engine.guided.tables import ENDED, MOST, GrammarTable
from jaxinfer.engine.guided.vocabulary import Vocabulary
from jaxinfer.sampling.structured import StructuredOutputsParams
from jaxinfer.sampling.table_sizes import BLOCK, BLOCKS, CLASSES, COMPLETE, FORCED, GOES_ON

BUILT_IN = 0.02  # seconds of a CPU's time for the automaton, and then for the states
ENUMERATING = frozenset({"enum", "const", "type", "title", "description", "default", "examples", "$schema"})
UNKNOWN = -1  # in place of a state: it was not reached yet


def table_of(
    asked: StructuredOutputsParams,
    guide: Guide,
    vocabulary: Vocabulary,
    fill: Callable[[Sequence[Guide]], np.ndarray],
) -> GrammarTable | None:
    """All states that can be reached from a guide at the beginning; None where they are too many, or not known. What
    may come is what llguidance says, once in each state (`fill`: masks u32[R, V/32]); an automaton over bytes says
    which states are the same."""
    texts = _texts(asked)
    if (texts is None and asked.regex is None) or asked.after is not None or asked.unless is not None:
        return None
    if asked.regex is not None and r"\d" in asked.regex:
        digits()  # once for all, and not in this one's time
    try:
        automaton = Automaton.of_texts(texts) if texts is not None else Automaton.of_regex(str(asked.regex), _until())
        states, until = _States(automaton, vocabulary), _until()
        states.add(START, guide)
        while states.pending:
            states.explore(fill, until)
    except (NotRegular, RecursionError):
        return None
    return states.table()


def _texts(asked: StructuredOutputsParams) -> Iterable[str] | None:
    """Those that there are, and perhaps more: choices, and what schemas enumerate."""
    if asked.choice is not None:
        return asked.choice
    schema = json.loads(asked.json) if isinstance(asked.json, str) else None
    if not isinstance(schema, dict) or not schema.keys() <= ENUMERATING:
        return None
    boolean = [True, False] if schema.get("type") == "boolean" else None
    values = schema.get("enum", [schema["const"]] if "const" in schema else boolean)
    return (json.dumps(value, ensure_ascii=False) for value in values) if isinstance(values, list) else None


def _until() -> float:
    return time.thread_time() + BUILT_IN


def _tokens(mask: np.ndarray, size: int) -> np.ndarray:
    """Those of `size` that have a bit in u32[V/32]: most words have none, often."""
    (words,) = mask.nonzero()
    word, bit = np.unpackbits(mask[words].view(np.uint8), bitorder="little").reshape(-1, 32).nonzero()
    tokens = words[word] * 32 + bit
    return tokens[: np.searchsorted(tokens, size)]


class _States:
    """Those that are known so far."""

    def __init__(self, automaton: Automaton, vocabulary: Vocabulary):
        self._automaton, self._vocabulary = automaton, vocabulary
        self._spelling, self._columns = vocabulary.spellings(automaton.kinds)
        self._numbers = np.full(len(automaton.next), UNKNOWN, np.int32)  # of states, by those of the automaton
        words = -(-vocabulary.size // 32)
        self._masks = np.zeros((BLOCKS * BLOCK, words), np.uint32)
        self._ends = [COMPLETE]
        self._leads: list[tuple[int, np.ndarray, np.ndarray]] = []  # from a state by tokens to states
        self._tails: dict[int, list[int]] = {}
        self.pending: list[tuple[int, int, Guide]] = []

    def add(self, at: int, guide: Guide) -> None:
        """The state in which a guide and the automaton are."""
        if guide.error is not None:
            raise NotRegular
        tail = guide.forced()
        if guide.complete:
            self._numbers[at] = ENDED
        elif tail and self._ends_with(at, tail):
            self._add_forced(at, tail)
        else:
            self.pending.append((at, self._new(at, GOES_ON), guide))

    def explore(self, fill: Callable[[Sequence[Guide]], np.ndarray], until: float) -> None:
        """Finds where those that are pending lead to."""
        now, self.pending = self.pending, []
        masks = fill([guide for *_, guide in now])
        for (at, number, guide), mask in zip(now, masks, strict=True):
            if time.thread_time() > until:
                raise NotRegular
            self._masks[number] = mask
            tokens = _tokens(mask, self._vocabulary.size)
            reached = self._walk(at, self._spelling[tokens])
            ending = self._vocabulary.is_special[tokens]
            if guide.error is not None or not len(tokens) or (reached[~ending] == DEAD).any():
                raise NotRegular
            found, first = np.unique(reached[~ending], return_index=True)
            for target, token in zip(found.tolist(), tokens[~ending][first].tolist(), strict=True):
                if self._numbers[target] == UNKNOWN:
                    self.add(target, guide.after(token))
            self._leads.append((number, tokens, np.where(ending, ENDED, self._numbers[reached])))

    def _new(self, at: int, end: int) -> int:
        number = len(self._ends)
        if number == len(self._masks):
            raise NotRegular
        self._ends.append(end)
        self._numbers[at] = number
        return number

    def _add_forced(self, at: int, tail: list[int]) -> None:
        """A state, and those after it: there is no choice until the text is complete."""
        for i, token in enumerate(tail):
            number = self._new(at, FORCED)
            self._tails[number] = tail[i:]
            self._masks[number, token >> 5] = 1 << (token & 31)
            at = self._step(at, token)
            after = ENDED if i == len(tail) - 1 else int(self._numbers[at])
            self._leads.append((number, np.array([token]), np.array([number + 1 if after == UNKNOWN else after])))
            if after != UNKNOWN:
                break

    def _ends_with(self, at: int, tail: list[int]) -> bool:
        for token in tail:
            at = self._step(at, token)
        return at != DEAD and not self._automaton.next[at].any()

    def _step(self, at: int, token: int) -> int:
        for byte in self._vocabulary.tokens[token]:
            at = self._automaton.next[at, self._automaton.kinds[byte]]
        return at

    def _walk(self, at: int, spelled: np.ndarray) -> np.ndarray:
        """Where spellings lead from a state of the automaton; see `Vocabulary.spellings`."""
        columns, count = self._columns, len(self._columns[0]) + 1 if self._columns else 1
        there = np.zeros(count, bool)
        there[spelled] = True
        (used,) = there.nonzero()
        reached = np.full(len(used), at, np.int32)
        for column in columns:
            skipped = count - len(column)  # those that are shorter
            first = int(np.searchsorted(used, skipped))
            if first == len(used):
                break
            reached[first:] = self._automaton.next[reached[first:], column[used[first:] - skipped]]
        leads = np.full(count, DEAD, np.int32)
        leads[used] = reached
        leads[0] = DEAD
        return leads[spelled]

    def table(self) -> GrammarTable | None:
        """Tokens that lead to the same state from everywhere are of one class: sums of random numbers say which."""
        random = np.random.default_rng(0).integers(1, 2**63, len(self._ends), np.uint64)
        sums = np.zeros(self._masks.shape[1] * 32, np.uint64)
        for number, tokens, after in self._leads:
            sums[tokens] += random[number] * (after.astype(np.uint64) + np.uint64(1))
        (used,) = sums.nonzero()
        found, inverse = np.unique(sums[used], return_inverse=True)
        if len(found) >= CLASSES:
            return None
        classes = np.zeros(len(sums), np.uint16)
        classes[used] = inverse + 1
        next = np.zeros((len(self._ends), len(found) + 1), np.uint16)
        for number, tokens, after in self._leads:
            next[number, classes[tokens]] = after
            if (next[number, classes[tokens]] != after).any():
                return None  # sums are the same by chance
        edges = [(number, after) for number, _, all_after in self._leads for after in set(all_after.tolist())]
        start, end = np.array(edges).T
        going_on, longest = np.array(self._ends) == GOES_ON, np.zeros(len(self._ends), np.int32)
        for _ in range(MOST):
            before, longest = longest, np.zeros(len(self._ends), np.int32)
            np.maximum.at(longest, start, before[end] + 1)
            longest *= going_on
            if (longest == before).all():
                break
        return GrammarTable(
            self._masks[: len(self._ends)].copy(), classes, next, np.array(self._ends, np.uint8), self._tails, longest
        )
