"""What all tasks have in common: input checked at once or as it comes, outputs all together or as they are done."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, Generic, NoReturn, Protocol, TypeVar

from jaxinfer.engine.feed import Feed, OnError
from jaxinfer.engine.outputs import RequestOutput, ScoreOutput
from jaxinfer.engine.thread import AnyGroup, EngineThread
from jaxinfer.errors import RequestError, placed


class Asked(Protocol):
    """What is asked for.

    index: its place in the input, and its output's index.
    """

    @property
    def index(self) -> int: ...


A = TypeVar("A", bound=Asked)
Out = TypeVar("Out", RequestOutput, ScoreOutput)


class Task(ABC, Generic[A, Out]):
    """One kind of thing to ask of an engine.

    noun: what one is called in errors.
    done: what has been done to its tokens.
    """

    noun: ClassVar[str]
    done: ClassVar[str]

    def __init__(self, thread: EngineThread):
        self.thread = thread
        self.engine = thread.engine
        self.tokenizer = thread.engine.tokenizer

    @abstractmethod
    def checked(self, asked: A) -> A:
        """In tokens, once it is sure that the engine takes it. Raises ValueError."""

    @abstractmethod
    def request(self, asked: A) -> AnyGroup:
        """The engine's request. Raises ValueError."""

    @abstractmethod
    def failure(self, asked: A, error: ValueError) -> Out:
        """The output of what can't be served, where on_error is "return"."""

    def run(self, asked: Iterable[A], on_error: OnError, in_order: bool = False) -> Iterator[Out]:
        """Outputs as they are done, or in order. What is read and can't be served ends the reading, or with
        on_error="return" has an output that says why."""
        if on_error not in ("raise", "return"):
            raise RequestError(f'on_error is {on_error!r}: it must be "raise" or "return"', "on_error")
        self.thread.check_open()
        failure: Any = self.failure if on_error == "return" else self._refused
        return Feed(self.thread, asked, self.request, failure, in_order).outputs()

    def run_all(self, asked: list[A], on_error: OnError, shown: bool) -> list[Out]:
        """All outputs, in the order of their places. With on_error="raise" nothing runs before all have been checked.
        shown: a bar on stderr."""
        if on_error == "raise":
            asked = self.checked_all(asked)
        outputs = progress(self.run(asked, on_error), len(asked), shown, self.done)
        return sorted(outputs, key=lambda output: output.index)

    def checked_all(self, asked: list[A]) -> list[A]:
        """All of them, checked. Raises ValueError saying which one fails."""
        checked = []
        for entry in asked:
            try:
                checked.append(self.checked(entry))
            except ValueError as error:
                if len(asked) == 1:
                    raise
                self._refused(entry, error)
        return checked

    def _refused(self, asked: A, error: ValueError) -> NoReturn:
        raise placed(f"{self.noun} {asked.index}", error) from None


def for_each(name: str, value: Any, asked: Sequence[Any]) -> list[Any]:
    """One value for all that is asked for, or a list of one each, as a list. Raises RequestError."""
    if not isinstance(value, list | tuple):
        return [value] * len(asked)
    if len(value) != len(asked):
        raise RequestError.at(name, f"{len(value)} for {len(asked)} prompts; give one for all, or one each")
    return list(value)


def progress(outputs: Iterator[Out], total: int, shown: bool, done: str) -> Iterator[Out]:
    """A bar on stderr with the tokens a second that were `done`."""
    if not shown:
        yield from outputs
        return
    from tqdm import tqdm

    tokens = 0
    with tqdm(outputs, total=total, desc=done) as bar:
        for output in bar:
            parts: Any = output.outputs if isinstance(output, RequestOutput) else [output]
            tokens += sum(len(part.token_ids) for part in parts)
            bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):.0f} tokens/s")
            yield output
