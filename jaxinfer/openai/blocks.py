"""Answers that are a list of blocks, one after the other, as Anthropic's messages and OpenAI's responses are: what both
streams have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from jaxinfer.openai.answers import Json
from jaxinfer.text.calls import Call
from jaxinfer.text.scanner import Kind, Piece


@dataclass(frozen=True)
class Counts:
    """Of tokens; reasoning: those of the completion that are none of the answer."""

    prompt: int
    cached: int
    completion: int
    reasoning: int = 0


@dataclass(frozen=True)
class Ending:
    """How an answer ended: the engine's words, and whether it has calls."""

    reason: str | None
    stop: int | str | None
    called: bool


class BlockWriter(ABC):
    """Writes one answer, as events and as a whole.

    reasoning: what came of it.
    """

    def __init__(self) -> None:
        self.reasoning = ""
        self.called = False
        self._kind: Kind | None = None
        self._text = ""

    def add(self, pieces: Sequence[Piece]) -> bytes:
        """The events of some more."""
        events = []
        for piece in pieces:
            if piece.call is not None:
                events += [self._closed(), self.call(piece.call)]
                self.called = True
                continue
            if piece.kind != self._kind:
                events += [self._closed(), self.open(piece.kind)]
                self._kind = piece.kind
            self._text += piece.text
            if piece.kind == "reasoning":
                self.reasoning += piece.text
            events.append(self.text(piece.text))
        return b"".join(events)

    def end(self, ending: Ending, counts: Counts) -> bytes:
        """The last events."""
        return self._closed() + self.finish(ending, counts)

    def _closed(self) -> bytes:
        if self._kind is None:
            return b""
        event = self.close(self._kind, self._text)
        self._kind, self._text = None, ""
        return event

    @abstractmethod
    def start(self, counts: Counts) -> bytes:
        """The first events."""

    @abstractmethod
    def open(self, kind: Kind) -> bytes:
        """A block of text begins."""

    @abstractmethod
    def text(self, text: str) -> bytes:
        """Some more of it."""

    @abstractmethod
    def close(self, kind: Kind, text: str) -> bytes:
        """It ends. text: all of it."""

    @abstractmethod
    def call(self, call: Call) -> bytes:
        """A whole block."""

    @abstractmethod
    def finish(self, ending: Ending, counts: Counts) -> bytes:
        """After the last block."""

    @abstractmethod
    def failed(self, message: str, status: int) -> bytes:
        """The answer breaks off."""

    @abstractmethod
    def body(self) -> Json:
        """The whole answer, after `end`."""
