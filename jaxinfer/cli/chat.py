"""`jaxinfer chat`."""

from __future__ import annotations

import difflib
import re
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxinfer.cli.console import Progress, print_pieces, say_error, title
from jaxinfer.cli.hosts import HostOptions
from jaxinfer.cli.options import (
    CHAT_TEMPLATE,
    ModelOptions,
    PromptAdapterOptions,
    SamplingOptions,
    Verbosity,
    grouped,
)
from jaxinfer.cli.options import chat_template as read_chat_template

if TYPE_CHECKING:
    from jaxinfer.engine.outputs import RequestOutput
    from jaxinfer.llm import LLM
    from jaxinfer.sampling.params import SamplingParams

COMMANDS = ("/help", "/reset", "/exit")
HELP = (
    "/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer or clears a line, /help says so."
)
PASTED = 0.05  # seconds within which lines come that belong together


@grouped
def chat(
    *,
    system: Annotated[
        str | None, typer.Option(metavar="S", help="What the model is told before the conversation.")
    ] = None,
    chat_template: CHAT_TEMPLATE = None,
    load: ModelOptions,
    adapters: PromptAdapterOptions,
    hosts: HostOptions,
    sampling: SamplingOptions,
    verbosity: Verbosity,
) -> None:
    """Talk with a model.

    /help says what can be typed besides messages. Lines that are pasted are one message. Ctrl-C stops an answer or
    clears a line; at an empty one it ends the conversation, as /exit and Ctrl-D do. In piped input each line is a
    message.
    """
    with verbosity.apply() as progress:
        sampling.params()
        adapter = adapters.used
        hosts.join()
        llm = load.load(progress, **adapters.loading)
        llm.engine.check_adapter(adapter)
        params = sampling.params(llm.get_default_sampling_params())
        template = None if chat_template is None else read_chat_template(chat_template, llm)
        conversation = Conversation(llm, params, system, template, adapter)
        progress.hide()
        in_terminal = sys.stdin.isatty()
        if in_terminal and not verbosity.quiet:
            print(HELP, file=sys.stderr)
        for message in _messages(in_terminal):
            try:
                match _command(message):
                    case "/exit":
                        return
                    case "/reset":
                        conversation.reset()
                    case "/help":
                        print(HELP, file=sys.stderr)
                    case _:
                        conversation.answer(message, progress)
            except ValueError as error:
                if not in_terminal:
                    raise
                say_error(error)


def _command(message: str) -> str | None:
    """The command that a message is, if it is one. Raises ValueError if there is no such command."""
    match = re.match(r"/[a-zA-Z]+(?=\s|$)", message)
    if match is None:
        return None
    if message.strip() in COMMANDS:
        return message.strip()
    close = difflib.get_close_matches(match[0], COMMANDS, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ValueError(f"no command {title(message)!r}: {hint}/help lists them; a space before it makes it a message")


class Conversation:
    """What has been said. Raises ValueError where the checkpoint's chat template can't express it."""

    def __init__(
        self,
        llm: LLM,
        params: SamplingParams,
        system: str | None,
        template: str | None = None,
        adapter: str | None = None,
    ) -> None:
        self._llm, self._adapter = llm, adapter
        self._template = {} if template is None else {"chat_template": template}
        self._params = params
        self._beginning = [] if system is None else [{"role": "system", "content": system}]
        self.reset()
        llm.chat_prompt([*self._messages, {"role": "user", "content": "?"}], **self._template)

    def reset(self) -> None:
        """Back to the beginning; the system message stays."""
        self._messages = list(self._beginning)

    def answer(self, message: str, progress: Progress) -> None:
        """Prints the answer as it comes. Ctrl-C stops it; what was said by then, if anything, is in the conversation.

        Raises ValueError, and forgets the message, when the conversation has become too long for the context.
        """
        messages = [*self._messages, {"role": "user", "content": message}]
        pieces: list[str] = []

        def noted(outputs: Iterator[tuple[str, RequestOutput]]) -> Iterator[str]:
            for piece, output in outputs:
                pieces.append(piece)
                yield piece
                if output.error is not None:
                    raise ValueError(output.error)

        try:
            prompt = self._llm.chat_prompt(messages, **self._template)
            stream: Any = self._llm.stream_output(prompt, self._params, adapter=self._adapter)
        except ValueError as error:
            raise ValueError(f"{error}; or forget the conversation with /reset") from None
        with closing(stream), suppress(KeyboardInterrupt):
            print_pieces(noted(stream), progress)
        if pieces:
            self._messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]


def _messages(in_terminal: bool) -> Iterator[str]:
    """What the user types, until the end of the input."""
    if not in_terminal:
        for line in sys.stdin:
            if line.strip():
                yield line.rstrip("\n")
        return
    typed: Callable[[], str] = str
    with suppress(ImportError):
        import readline  # input() edits and remembers lines with it

        readline.parse_and_bind("set enable-bracketed-paste on")  # what a terminal says is pasted is one line
        typed = readline.get_line_buffer
    while True:
        lines: list[str] = []
        try:
            lines.append(input("> "))
            while _more_is_there():  # pasted into a terminal that does not say so
                lines.append(input())
        except (EOFError, KeyboardInterrupt) as ended:
            print()
            if isinstance(ended, KeyboardInterrupt):
                if lines or typed():
                    continue
                raise
            if not lines:
                return
        message = "\n".join(lines)
        if message.strip():
            yield message


def _more_is_there() -> bool:
    """Whether the terminal has more input already."""
    with suppress(OSError, ValueError):
        return bool(select.select([sys.stdin], [], [], PASTED)[0])
    return False
