"""What is asked of an engine, and its place in the input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn, TypeVar

from jaxinfer.engine.outputs import RequestOutput, ScoreOutput, error_output, score_error
from jaxinfer.engine.prompts import Encoded, Prompt
from jaxinfer.sampling.params import SamplingParams


class Asked(NamedTuple):
    """A prompt, its place in the input, its parameters and its priority."""

    place: int
    prompt: Prompt | Encoded
    params: SamplingParams
    priority: int = 0


Text = str | Sequence[int]
Scorable = Text | tuple[Text, Text]  # a text, or a prompt and its continuation


class Pair(NamedTuple):
    """A scorable as tokens: the text that is scored, or None, ids that are given, ids that are scored."""

    text: str | None
    given: list[int]
    scored: list[int]


class ScoreAsked(NamedTuple):
    """What is to be scored, and its place in the input."""

    place: int
    scorable: Scorable | Pair


AnyAsked = TypeVar("AnyAsked", Asked, ScoreAsked)
Checked = TypeVar("Checked")


def checked(asked: list[AnyAsked], check: Callable[[AnyAsked], Checked]) -> list[tuple[AnyAsked, Checked]]:
    """All of them with what the check makes of them, before anything runs. Raises ValueError saying which one fails."""
    checked = []
    for one in asked:
        try:
            checked.append((one, check(one)))
        except ValueError as error:
            raise ValueError(f"{_kind(one)} {one.place}: {error}" if len(asked) > 1 else str(error)) from None
    return checked


def failed(asked: Asked | ScoreAsked, error: ValueError) -> RequestOutput | ScoreOutput:
    """The output of what can't be served, where on_error is "return"."""
    return (error_output if isinstance(asked, Asked) else score_error)(asked.place, str(error))


def refused(asked: Asked | ScoreAsked, error: ValueError) -> NoReturn:
    """What is raised of it, where on_error is "raise"."""
    raise ValueError(f"{_kind(asked)} {asked.place}: {error}") from None


def _kind(asked: Asked | ScoreAsked) -> str:
    return "prompt" if isinstance(asked, Asked) else "text"
