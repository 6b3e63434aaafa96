"""A model's text to a message: reasoning, content and calls of tools, as the text comes.

There is one scanner for all formats, which are tables of sections (`jaxinfer.text.formats`). What it gives, joined,
depends on the text alone and not on how that was cut: it decides nothing before what follows can't change it.
"""

from __future__ import annotations

import dataclasses
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from jaxinfer.text.calls import Call, Parse, Schemas

__all__ = ["Format", "Message", "Piece", "Scanner", "Section", "Written"]

Kind = Literal["content", "reasoning", "call"]
Written = Callable[[str, str, Mapping[str, Any] | None], list[str]]


@dataclass(frozen=True)
class Section:
    """A part of a text that is not content.

    opens: the marker that it begins with. closes: those that end it; without any the end of the text does, and a marker
        whose kind is "content" stands alone.
    parse: of a section of calls, what becomes of what is in it.
    whole: whether what is in it may end there: a closing marker inside of a string is none.
    bare: nothing but its form tells that it is a call, as text that begins with a brace: it may only be where the
        content begins, the marker is part of it, and tools that are not known are none.
    written: how a call stands between the markers, for `jaxinfer.text.strict`: rules of a grammar, from the first one's
        name, a tool's, and the schema of its arguments, None for any.
    """

    kind: Kind
    opens: str
    closes: tuple[str, ...] = ()
    parse: Parse | None = None
    whole: Callable[[str], bool] = lambda body: True
    bare: bool = False
    written: Written | None = None


@dataclass(frozen=True)
class Format:
    """What a model writes.

    sections: with the markers that only separate them.
    id_digits: of calls: so many digits and letters make their ids, as templates of Mistral's want.
    """

    sections: tuple[Section, ...]
    id_digits: int = 0

    def kept(self, calls: bool) -> Format:
        """With sections of calls, or without."""
        return (
            self if calls else dataclasses.replace(self, sections=tuple(s for s in self.sections if s.kind != "call"))
        )

    @cached_property
    def markers(self) -> tuple[str, ...]:
        """What the text is searched for where no section is open."""
        return tuple(section.opens for section in self.sections if not section.bare)

    @cached_property
    def bare(self) -> tuple[Section, ...]:
        return tuple(section for section in self.sections if section.bare)

    def section(self, marker: str) -> Section:
        return next(section for section in self.sections if section.opens == marker and not section.bare)

    def new_id(self) -> str:
        """Of a call for which the model has none."""
        return secrets.token_hex(16)[: self.id_digits] if self.id_digits else f"call_{secrets.token_hex(12)}"


@dataclass(frozen=True)
class Piece:
    """Some more of a message: text of its reasoning or content, or a whole call."""

    kind: Kind
    text: str = ""
    call: Call | None = None


@dataclass
class Message:
    """What an assistant says."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)

    def add(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            if piece.call is not None:
                self.calls.append(piece.call)
            elif piece.kind == "reasoning":
                self.reasoning += piece.text
            else:
                self.content += piece.text


class Scanner:
    """Takes text in any pieces, gives the message's.

    tools: what may be called; None: nothing, and text that looks like a call is content.
    open_with: the marker of the section that the prompt has opened already.
    most_calls: further ones are left out.

    White space around sections is no part of anything. A call is given when it is whole; what is in a section of calls
    and is none is content, or, if the text broke off in it, nothing.
    """

    def __init__(
        self, form: Format, tools: Schemas | None = None, open_with: str | None = None, most_calls: int | None = None
    ):
        self._form = form.kept(tools is not None)
        self._tools = tools or {}
        self._most = most_calls
        self._held = ""  # what is not decided
        self._searched = 0  # of what is held in a section of calls
        self._section = None if open_with is None else self._form.section(open_with)
        self._begun = False  # whether there was any content but white space
        self._trim = open_with is not None
        self._space = ""  # at the end of what was given: it may come before a section
        self._calls = 0

    def push(self, text: str) -> list[Piece]:
        """What has become certain."""
        self._held += text
        pieces: list[Piece] = []
        while self._step(pieces, False):
            pass
        return pieces

    def finish(self, whole: bool = True) -> list[Piece]:
        """No more text comes: the rest. whole: the model ended it, and not a limit."""
        pieces: list[Piece] = []
        while self._step(pieces, True):
            pass
        section, body = self._section, self._held
        self._held = ""
        if section is not None and section.kind == "call":
            if whole or section.bare:
                self._end(pieces, section, body, "")
        else:
            self._give(pieces, "content" if section is None else section.kind, body)
        if self._space and (section is None or section.kind == "content") and not self._trim:
            pieces.append(Piece("content", self._space))
        return pieces

    def _step(self, pieces: list[Piece], last: bool) -> bool:
        """Goes on to the next marker. False if more text is needed."""
        section = self._section
        if section is not None and section.kind == "call":
            return self._in_calls(pieces, section, last)
        if section is None and not self._begun and self._form.bare:
            rest = self._held.lstrip()
            if not rest:
                return False
            bare = next((bare for bare in self._form.bare if rest.startswith(bare.opens)), None)
            if bare is not None:
                self._open(bare)
                self._space, self._held, self._begun = self._held[: len(self._held) - len(rest)], rest, True
                return True
        kind: Kind = "content" if section is None else section.kind
        start, marker = _first(self._held, self._form.markers if section is None else section.closes, last)
        self._give(pieces, kind, self._held[:start])
        self._held = self._held[start + len(marker) :]
        if not marker:
            return False
        if section is not None:
            self._open(None)
        else:
            opened = self._form.section(marker)
            self._open(opened if opened.kind != "content" else None)
        return True

    def _in_calls(self, pieces: list[Piece], section: Section, last: bool) -> bool:
        start, marker = _first(self._held[self._searched :], section.closes, last)
        start += self._searched
        if not marker:
            self._searched = start
            return False
        body, end = self._held[:start], start + len(marker)
        if not section.whole(body):
            self._searched = end
            return True
        self._held, self._searched = self._held[end:], 0
        self._end(pieces, section, body, marker)
        return True

    def _end(self, pieces: list[Piece], section: Section, body: str, marker: str) -> None:
        assert section.parse is not None
        calls = section.parse(body, self._tools)
        if calls is None or (section.bare and any(call.name not in self._tools for call in calls)):
            self._section = None
            self._give(pieces, "content", ("" if section.bare else section.opens) + body + marker)
            return
        self._open(None)
        for call in calls:
            self._calls += 1
            if self._most is None or self._calls <= self._most:
                named = call if call.id else dataclasses.replace(call, id=self._form.new_id())
                pieces.append(Piece("call", call=named))

    def _open(self, section: Section | None) -> None:
        self._section, self._searched = section, 0
        if section is None or section.kind != "call":  # which may turn out to be content
            self._space, self._trim = "", True

    def _give(self, pieces: list[Piece], kind: Kind, text: str) -> None:
        if self._trim:
            text = text.lstrip()
        if not text:
            return
        self._trim = False
        text = self._space + text
        kept = text.rstrip()
        self._space = text[len(kept) :]
        if kept:
            self._begun = self._begun or kind == "content"
            pieces.append(Piece(kind, kept))


def _first(text: str, markers: Sequence[str], last: bool) -> tuple[int, str]:
    """Where the first marker is, and which, of several there the longest; or how much is certain to be before any, and
    "". last: no more text follows."""
    if not markers:
        return (len(text), "")
    match = _pattern(tuple(markers)).search(text)
    if match is not None:
        rest = text[match.start() :]
        if last or not any(len(marker) > len(rest) and marker.startswith(rest) for marker in markers):
            return match.start(), match[0]
        return match.start(), ""
    if last:
        return len(text), ""
    longest = max(map(len, markers))
    for size in range(min(len(text), longest - 1), 0, -1):
        if any(marker.startswith(text[-size:]) for marker in markers):
            return len(text) - size, ""
    return len(text), ""


_PATTERNS: dict[tuple[str, ...], re.Pattern[str]] = {}


def _pattern(markers: tuple[str, ...]) -> re.Pattern[str]:
    if markers not in _PATTERNS:
        _PATTERNS[markers] = re.compile("|".join(map(re.escape, sorted(markers, key=len, reverse=True))))
    return _PATTERNS[markers]
