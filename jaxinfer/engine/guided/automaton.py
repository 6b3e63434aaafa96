"""Finite automata over bytes: of some texts, and of what regular expressions have in common."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import numpy as np

from jaxinfer.engine.guided.digits import Ranges, Tree, digits

MOST_STATES = 2048
MOST_PARTS = 4096  # of an expression, each repetition written out
DEAD, START = 0, 1
# All characters that are not ASCII.
LAST: Tree = ((((0x80, 0xBF),), ()),)
LAST_2: Tree = ((((0x80, 0xBF),), LAST),)
LAST_3: Tree = ((((0x80, 0xBF),), LAST_2),)
OTHERS: Tree = (
    (((0xC2, 0xDF),), LAST),
    (((0xE0, 0xE0),), ((((0xA0, 0xBF),), LAST),)),
    (((0xE1, 0xEC), (0xEE, 0xEF)), LAST_2),
    (((0xED, 0xED),), ((((0x80, 0x9F),), LAST),)),
    (((0xF0, 0xF0),), ((((0x90, 0xBF),), LAST_2),)),
    (((0xF1, 0xF3),), LAST_3),
    (((0xF4, 0xF4),), ((((0x80, 0x8F),), LAST_2),)),
)
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v"}
DIGIT, DIGITS = "\\d", frozenset(b"0123456789")
META = frozenset("\\.+*?()|[]{}^$")


class NotRegular(Exception):
    """None is made: of something else, or a large one."""


class Automaton:
    """Deterministic; in state DEAD no text is left.

    kinds: u8[256], bytes that are alike; 0 is of those that no text has.
    next: i32[states, kinds].
    """

    def __init__(self, kinds: np.ndarray, next: np.ndarray):
        self.kinds, self.next = kinds, next

    @staticmethod
    def of_texts(texts: Iterable[str]) -> Automaton:
        """Their trie."""
        rows: list[dict[int, int]] = [{}, {}]
        for text in texts:
            if len(text) > MOST_STATES:
                raise NotRegular
            at = START
            for byte in text.encode():
                if byte not in rows[at]:
                    rows[at][byte] = len(rows)
                    rows.append({})
                at = rows[at][byte]
            if len(rows) > MOST_STATES:
                raise NotRegular
        return _deterministic(rows)

    @staticmethod
    def of_regex(pattern: str, until: float) -> Automaton:
        """Raises NotRegular for what has not the same meaning to everyone, what would be large or is not there by
        `until` in time.thread_time, and what is wrong."""
        if len(pattern) > MOST_PARTS:
            raise NotRegular
        return _Parser(pattern, until).automaton()


def _deterministic(rows: Sequence[dict[int, int]]) -> Automaton:
    """From transitions by byte: bytes of equal columns are of one kind."""
    whole = np.zeros((len(rows), 256), np.int32)
    for state, row in enumerate(rows):
        whole[state, list(row)] = list(row.values())
    numbers = {bytes(whole[:, 0].nbytes): 0}
    kinds = np.array([numbers.setdefault(whole[:, byte].tobytes(), len(numbers)) for byte in range(256)], np.uint16)
    next = np.zeros((len(rows), len(numbers)), np.int32)
    next[:, kinds] = whole
    return Automaton(kinds, next)


class _Parser:
    """A regular expression to an automaton with several states at once (Thompson), and that to one with one."""

    def __init__(self, pattern: str, until: float):
        self._text, self._at, self._until = pattern, 0, until
        self._edges: list[list[tuple[Ranges, int]]] = []
        self._free: list[list[int]] = []

    def automaton(self) -> Automaton:
        whole = self._text
        self._text = self._text.removeprefix("^")
        if self._text.endswith("$") and (len(self._text) - len(self._text[:-1].rstrip("\\"))) % 2:
            self._text = self._text[:-1]
        start = self._node()
        # An anchor may be meant of the whole or of one of the alternatives.
        end = self._alternatives(start) if self._text == whole else self._sequence(start)
        if self._at < len(self._text):
            raise NotRegular
        return self._subsets(start, end)

    def _node(self) -> int:
        if len(self._edges) >= MOST_PARTS:
            raise NotRegular
        self._edges.append([])
        self._free.append([])
        return len(self._edges) - 1

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _take(self) -> str:
        character = self._peek()
        if not character:
            raise NotRegular
        self._at += 1
        return character

    def _alternatives(self, start: int) -> int:
        """What begins at a node; the node at which it ends."""
        end = self._node()
        while True:
            self._free[self._sequence(start)].append(end)
            if self._peek() != "|":
                return end
            self._at += 1

    def _sequence(self, start: int) -> int:
        at = self._node()
        self._free[start].append(at)
        while self._peek() not in ("", "|", ")"):
            at = self._repeated(at)
        return at

    def _repeated(self, start: int) -> int:
        begin = self._at
        end = self._atom(start)
        least, most = self._count()
        if (least, most) == (1, 1):
            return end
        after, last = self._at, start
        ends = [start] if least == 0 else []
        for i in range(1, (max(least, 1) if most is None else most) + 1):
            if i > 1:  # the first one is there; each further one is read again
                self._at, last = begin, self._node()
                self._free[end].append(last)
                end = self._atom(last)
            if i >= least:
                ends.append(end)
        if most is None:
            self._free[end].append(last)
        self._at = after
        out = self._node()
        for node in ends:
            self._free[node].append(out)
        return out

    def _count(self) -> tuple[int, int | None]:
        sign = self._peek()
        found: tuple[int, int | None] = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(sign, (1, 1))
        if found != (1, 1):
            self._at += 1
        elif sign == "{":
            inside, closed, _ = self._text[self._at + 1 :].partition("}")
            low, comma, high = inside.partition(",")
            if not closed or not low.isdecimal() or not (high.isdecimal() or not high) or not inside.isascii():
                raise NotRegular
            self._at += len(inside) + 2
            found = int(low), None if comma and not high else int(high or low)
        else:
            return found
        if self._peek() in ("*", "+", "?", "{"):
            raise NotRegular  # lazy ones, and repetitions of repetitions
        if found[1] is not None and found[1] < max(found[0], 1):
            raise NotRegular
        return found

    def _atom(self, start: int) -> int:
        character = self._take()
        if character == "(":
            if self._peek() == "?":
                if self._text[self._at : self._at + 2] != "?:":
                    raise NotRegular
                self._at += 2
            inner = self._node()
            self._free[start].append(inner)
            end = self._alternatives(inner)
            if self._take() != ")":
                raise NotRegular
            return end
        if character == "[":
            return self._characters(start, *self._class())
        if character == ".":
            return self._characters(start, set(range(128)) - {ord("\n")}, OTHERS)
        if character == "\\":
            if self._is_digit():
                return self._characters(start, set(DIGITS), digits())
            character = self._escaped()
        elif character in META:
            raise NotRegular
        for byte in character.encode():
            after = self._node()
            self._edges[start].append((((byte, byte),), after))
            start = after
        return start

    def _escaped(self) -> str:
        """Not other classes: what they have beyond ASCII differs."""
        character = self._take()
        if character in ESCAPES:
            return ESCAPES[character]
        if not character.isascii() or character.isalnum() or character in " <>":
            raise NotRegular
        return character

    def _class(self) -> tuple[set[int], Tree]:
        """ASCII characters, and others."""
        inside, negated = self._until_bracket(), False
        if inside[:1] == ["^"]:
            inside, negated = inside[1:], True
        found: set[int] = set()
        others: Tree = ()
        while inside:
            low, *inside = inside
            if low == DIGIT:
                if negated or inside[:1] == ["-"]:
                    raise NotRegular
                found, others = found | DIGITS, digits()
            elif inside[:1] == ["-"] and len(inside) > 1:
                _, high, *inside = inside
                if low == "-" or high in ("-", DIGIT) or high[-1] < low[-1]:
                    raise NotRegular
                found.update(range(ord(low[-1]), ord(high[-1]) + 1))
            else:
                found.add(ord(low[-1]))
        return (set(range(128)) - found, OTHERS) if negated else (found, others)

    def _until_bracket(self) -> list[str]:
        """The characters of a class; escaped ones have a backslash before them."""
        inside: list[str] = []
        while (character := self._take()) != "]":
            if character == "\\":
                character += "d" if self._is_digit() else self._escaped()
            if not character.isascii() or character in ("[", "&", "~", "^" if inside else ""):
                raise NotRegular  # sets of sets, perhaps
            inside.append(character)
        if not inside or inside == ["^"]:
            raise NotRegular  # a bracket that is meant
        return inside

    def _is_digit(self) -> bool:
        """Whether it is a `d`, which is then taken."""
        found = self._peek() == "d"
        self._at += found
        return found

    def _characters(self, start: int, ascii_ones: set[int], others: Tree) -> int:
        if not ascii_ones and not others:
            raise NotRegular
        end = self._node()
        self._edges[start].append((tuple((byte, byte) for byte in sorted(ascii_ones)), end))
        self._tree(start, others, {(): end})
        return end

    def _tree(self, start: int, tree: Tree, known: dict[Tree, int]) -> None:
        """known: where what follows begins; what is the same is there once, or there would be more states."""
        for ranges, rest in tree:
            there = rest in known
            if not there:
                known[rest] = self._node()
            self._edges[start].append((ranges, known[rest]))
            if not there:
                self._tree(known[rest], rest, known)

    def _subsets(self, start: int, end: int) -> Automaton:
        def closed(nodes: Iterable[int]) -> frozenset[int]:
            found, pending = set(nodes), list(nodes)
            while pending:
                for node in self._free[pending.pop()]:
                    if node not in found:
                        found.add(node)
                        pending.append(node)
            # Those that lead on: others would only make states differ that are not different.
            return frozenset(node for node in found if self._edges[node] or node == end)

        first = closed([start])
        known, pending = {first: START}, [first]
        rows: list[dict[int, int]] = [{}, {}]
        while pending:
            nodes = pending.pop()
            targets: dict[int, set[int]] = {}
            for node in nodes:
                if time.thread_time() > self._until:
                    raise NotRegular
                for ranges, target in self._edges[node]:
                    for low, high in ranges:
                        for byte in range(low, high + 1):
                            targets.setdefault(byte, set()).add(target)
            by_targets: dict[frozenset[int], int] = {}
            for byte, reached in targets.items():
                key = frozenset(reached)
                if key not in by_targets:
                    subset = closed(key)
                    if subset not in known:
                        if len(rows) >= MOST_STATES:
                            raise NotRegular
                        known[subset] = len(rows)
                        rows.append({})
                        pending.append(subset)
                    by_targets[key] = known[subset]
                rows[known[nodes]][byte] = by_targets[key]
        return _deterministic(rows)
