"""`jaxinfer chat`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from jaxinfer.cli.console import Progress, print_pieces, say_error
from jaxinfer.cli.hosts import HostOptions
from jaxinfer.cli.options import LoadOptions, SamplingOptions, Verbosity, grouped

if TYPE_CHECKING:
    from jaxinfer.llm import LLM
    from jaxinfer.sampling.params import SamplingParams


@grouped
def chat(
    *,
    system: Annotated[
        str | None, typer.Option(metavar="S", help="What the model is told before the conversation.")
    ] = None,
    load: LoadOptions,
    hosts: HostOptions,
    sampling: SamplingOptions,
    verbosity: Verbosity,
) -> None:
    """Talk with a model.

    /reset forgets the conversation; /exit or Ctrl-D ends it; Ctrl-C stops an answer. In piped input each line is a
    message.
    """
    with verbosity.apply() as progress:
        sampling.params()
        hosts.join()
        llm = load.load(progress)
        params = sampling.params(llm.get_default_sampling_params())
        conversation = Conversation(llm, params, system)
        progress.hide()
        in_terminal = sys.stdin.isatty()
        if in_terminal and not verbosity.quiet:
            print("/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer.", file=sys.stderr)
        for message in _messages(in_terminal):
            if message == "/exit":
                return
            if message == "/reset":
                conversation.reset()
                continue
            try:
                conversation.answer(message, progress)
            except ValueError as error:
                if not in_terminal:
                    raise
                say_error(f"{error}; or forget the conversation with /reset")


class Conversation:
    """What has been said. Raises ValueError where the checkpoint's chat template can't express it."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None) -> None:
        self._llm = llm
        self._params = params
        self._beginning = [] if system is None else [{"role": "system", "content": system}]
        self.reset()
        llm.chat_prompt([*self._messages, {"role": "user", "content": "?"}])

    def reset(self) -> None:
        """Back to the beginning; the system message stays."""
        self._messages = list(self._beginning)

    def answer(self, message: str, progress: Progress) -> None:
        """Prints the answer as it comes. Ctrl-C stops it; what was said by then is part of the conversation.

        Raises ValueError, and forgets the message, when the conversation has become too long for the context.
        """
        messages = [*self._messages, {"role": "user", "content": message}]
        said: list[str] = []

        def until_stopped() -> Iterator[str]:
            for piece, _ in outputs:
                said.append(piece)
                yield piece
                if noted:
                    break

        with _ctrl_c_noted() as noted:
            outputs = self._llm.stream_output(self._llm.chat_prompt(messages), self._params)
            print_pieces(until_stopped(), progress)
        self._messages = [*messages, {"role": "assistant", "content": "".join(said)}]


def _messages(in_terminal: bool) -> Iterator[str]:
    """What the user types, until the end of the input."""
    if not in_terminal:
        for line in sys.stdin:
            if line.strip():
                yield line.rstrip("\n")
        return
    with suppress(ImportError):
        import readline  # noqa: F401  (makes input() edit and remember lines)
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt) as ended:
            print()
            if isinstance(ended, EOFError):
                return
            raise
        if line.strip():
            yield line


@contextmanager
def _ctrl_c_noted() -> Iterator[list[int]]:
    """Within it the first Ctrl-C only appends to the list, and is to be noticed between two pieces of text: the
    second one interrupts, wherever that is."""
    noted: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)
