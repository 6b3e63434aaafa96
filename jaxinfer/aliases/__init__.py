"""What options of vLLM, transformers and mlx-lm are here: data, and how what somebody gives is read by it.

An option is ours under another name (`same`, `made`), or asks for what is done anyhow, or is refused with what to do
instead. Signatures: vLLM's LLM, EngineArgs and SamplingParams (https://github.com/vllm-project/vllm), transformers'
GenerationConfig and from_pretrained, mlx-lm's generate and stream_generate.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

from jaxinfer.errors import RequestError, UnsupportedError

P = ParamSpec("P")
R = TypeVar("R")

Options = Mapping[str, Any]
ANY = object()  # any value is fine
PLAIN = (bool, int, float, str, list, tuple, dict, set)


@dataclass(frozen=True)
class Words:
    """Other programs' names for the options of something.

    what, refused: how the error begins.
    same: ours of the same meaning.
    made: ours with their values, from a value and all that is given; ValueError for what is none.
    instead: what to do in place of an option.
    fine: the values of it that ask for what is done anyhow; where there are none, those that ask for nothing (None,
        False, 0, "auto", and what is empty). None always does.
    is_request: what is wrong is wrong with a request.
    """

    what: str
    refused: str = "is not supported"
    same: Mapping[str, str] = field(default_factory=dict)
    made: Mapping[str, Callable[[Any, Options], dict[str, Any]]] = field(default_factory=dict)
    instead: Mapping[str, str] = field(default_factory=dict)
    fine: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    is_request: bool = False

    def __contains__(self, name: str) -> bool:
        return name in self.same or name in self.made or name in self.instead

    def __iter__(self) -> Iterator[str]:
        return iter({**self.same, **self.made, **self.instead})

    def word(self, name: str) -> str:
        """What an option is here."""
        return self.instead.get(name) or f"here it is {self.same[name]}"

    def meaning(self, names: Iterable[str], instead: str) -> Words:
        """These, and further names, which are something else whatever their value."""
        more = [name for name in names if name not in self]
        return dataclasses.replace(
            self,
            instead={**self.instead, **dict.fromkeys(more, instead)},
            fine={**self.fine, **dict.fromkeys(more, ())},
        )

    def translated(self, options: Options, known: Collection[str] | None) -> dict[str, Any]:
        """The options in our words. known: ours, which come first; None: all that are nobody else's. Raises one
        ValueError for all that is wrong."""
        known = [name for name in options if name not in self] if known is None else known
        translation, problems = self.read(options, known)
        if problems:
            raise self.error(problems, known)
        return translation

    def read(self, options: Options, known: Collection[str]) -> tuple[dict[str, Any], dict[str, str]]:
        """The options in our words, and what is wrong with the others, by name."""
        translation = {name: value for name, value in options.items() if name in known}
        problems: dict[str, str] = {}
        for name, value in options.items():
            ours_too = name in self.same or name in self.made
            if name in known or (value is None and name in self) or (not ours_too and self._is_fine(name, value)):
                continue
            if not ours_too:
                close = difflib.get_close_matches(name, known, n=1)
                guess = f"did you mean {close[0]}?" if close else ""
                problems[name] = self.instead.get(name, guess)
                continue
            try:
                ours = self.made[name](value, options) if name in self.made else {self.same[name]: value}
            except ValueError as error:
                problems[name] = str(error)
                continue
            for our, meant in ours.items():
                if our in translation and (our in options or name in self.same):
                    problems[name] = f"it is {our} here, which is given too: leave one of them out"
                else:
                    translation[our] = _joined(translation[our], meant) if our in translation else meant
        return translation, problems

    def error(self, problems: Mapping[str, str], known: Collection[str]) -> ValueError:
        """One for all of them; its param is the first."""
        text = self.refusal(problems, known)
        if not self.is_request:
            return ValueError(text)
        undone = all(name in self and name not in self.same and name not in self.made for name in problems)
        return (UnsupportedError if undone else RequestError)(text, next(iter(problems)))

    def refusal(self, problems: Mapping[str, str], known: Collection[str]) -> str:
        """One line for all of them; what there is, where a name is nobody's."""
        text = "; ".join(
            f"{name}: {why}" if name in self else f"{name!r} {self.refused}{': ' * bool(why)}{why}"
            for name, why in problems.items()
        )
        strange = any(name not in self for name in problems)
        return f"{self.what} {text}" + (f"; known are {', '.join(known)}" if strange else "")

    def _is_fine(self, name: str, value: Any) -> bool:
        """Whether it asks for what is done anyhow."""
        if name not in self.instead:
            return False
        fine = self.fine.get(name)
        if fine is None:
            return isinstance(value, PLAIN) and (not value or value == "auto")
        setting = getattr(value, "name", value)  # of an enum
        return ANY in fine or (isinstance(setting, PLAIN) and any(_same(setting, choice) for choice in fine))


def _joined(one: Any, other: Any) -> Any:
    """Of two options that are one here: axes of a mesh, or fields of a grammar."""
    return {**one, **other} if isinstance(one, Mapping) else f"{one},{other}"


def _same(value: Any, other: Any) -> bool:
    """1 is no True, but 4.0 is 4."""
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


def takes(words: Words) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A function's keyword arguments may have other programs' names."""

    def wrap(call: Callable[P, R]) -> Callable[P, R]:
        known = [name for name in inspect.signature(call).parameters if name != "self"]

        @functools.wraps(call)
        def named(*args: P.args, **kwargs: P.kwargs) -> R:
            ours: Any = kwargs if kwargs.keys() <= set(known) else words.translated(kwargs, known)
            return call(*args, **ours)

        return named

    return wrap


def names(reasons: Mapping[str, str]) -> dict[str, str]:
    """What is said of several names, each."""
    return {name: why for names, why in reasons.items() for name in names.split()}
