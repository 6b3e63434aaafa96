"""The `jaxinfer` command: one file a command, each with a function of the same name, or a typer.Typer of several.

Nothing heavy is imported here or at the top of a command's file, so that `jaxinfer --help` is fast.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, cast

import typer
from typer.core import TyperGroup

from jaxinfer import __version__
from jaxinfer.cli.absent_tpu import leave_absent_tpu_alone
from jaxinfer.cli.console import say_error

# A new command is a line here and a file beside this one.
COMMANDS = (
    "generate",
    "chat",
    "serve",
    "batch",
    "score",
    "embed",
    "classify",
    "rerank",
    "bench",
    "plan",
    "compile",
    "compare",
    "convert",
    "merge",
    "quantize",
    "lm-eval",
    "models",
    "doctor",
    "help",
)

# What other programs call things that are something else here, or nothing yet.
GUESSES = {
    "api": "did you mean jaxinfer serve?",
    "download": "a model is downloaded when it is first used: jaxinfer generate --model ORG/NAME",
    "list": "jaxinfer models lists the architectures that load",
    "run": "did you mean jaxinfer generate, chat or batch?",
    "encode": "did you mean jaxinfer embed?",
    "complete": "did you mean jaxinfer generate?",
    "eval": "did you mean jaxinfer lm-eval, or score?",
    "benchmark": "did you mean jaxinfer bench throughput, or bench latency?",
    "version": "did you mean jaxinfer --version?",
}
SAME = {"server": "api", "start": "api"}
SAME |= {"pull": "download", "fetch": "download", "ls": "list", "show": "list"}
SAME |= {"embeddings": "encode", "similarity": "encode"}
SAME |= {"prompt": "run", "ask": "run", "completion": "complete", "evaluate": "eval", "perf": "benchmark"}


INTERRUPTED, TERMINATED = 130, 143  # by Ctrl-C; by SIGTERM that came again, or after the time for it


class Commands(TyperGroup):
    """Says of a command that is not there what there is instead."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        guess = GUESSES.get(SAME.get(args[0], args[0]))
        if guess is not None:
            raise ValueError(f"no command {args[0]!r}: {guess}")
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="jaxinfer",
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
for _name in COMMANDS:
    _function = _name.replace("-", "_")
    _command = getattr(importlib.import_module(f"jaxinfer.cli.{_function}"), _function)
    if isinstance(_command, typer.Typer):
        app.add_typer(_command, name=_name)
    else:
        app.command(_name, context_settings=getattr(_command, "context_settings", None))(_command)

# What every mistake in a command line derives from: click's, which typer has moved between versions.
UsageError = cast("type[Exception]", typer.BadParameter.__bases__[0])


@app.callback(invoke_without_command=True)
def _jaxinfer(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    """Inference for large models on JAX: TPU, GPU and CPU."""
    if version:
        print(__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())


def _hints(arguments: Sequence[str], known: Sequence[str]) -> list[str]:
    """What other programs' options on a command line are here, all of them. known: the command's own."""
    from jaxinfer.aliases.loading import LOADING
    from jaxinfer.aliases.sampling import SAMPLING

    hints = {}
    for argument in arguments:
        option, name = argument.partition("=")[0], argument.partition("=")[0].removeprefix("--").replace("-", "_")
        words = next((words for words in (SAMPLING, LOADING) if name in words), None)
        if argument.startswith("--") and words is not None and name not in known:
            ours = words.same.get(name)
            hint = f"here it is --{ours.replace('_', '-')}" if ours and ours in known else words.word(name)
            hints[option] = f"{option}: {hint}"
    return list(hints.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line (default: the process's, which then ends here) and returns its exit code.

    2 after one line on stderr for what the user can put right (ValueError, OSError), 130 after Ctrl-C, 143 after
    SIGTERM that let nothing end, 1 when nobody reads the output any more. Whatever else is raised is a bug and gets
    through.
    """
    if arguments is None:
        leave_absent_tpu_alone()
    code = _run(arguments)
    if arguments is None and code:
        _leave(code)
    return code


def _leave(code: int) -> None:
    """Ends the process now, after a signal or an error, if programs are still being compiled: Python would wait. After
    a signal not for a call of the device either."""
    from jaxinfer import distributed
    from jaxinfer.engine import background

    group = distributed.group()
    if background.running() or (code in (INTERRUPTED, TERMINATED) and group is None):
        if group is not None:
            group.end()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # None after a broken pipe
                stream.flush()
        os._exit(code)


def _run(arguments: Sequence[str] | None) -> int:
    try:
        code = app(arguments, prog_name="jaxinfer", standalone_mode=False)  # KeyboardInterrupt becomes 130 in there
        sys.stdout.flush()
    except UsageError as error:
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "jaxinfer"
        known = [parameter.name for parameter in context.command.params] if context else []
        hints = "".join(f"; {hint}" for hint in _hints(sys.argv[1:] if arguments is None else arguments, known))
        say_error(f"{error.format_message().rstrip('.')}{hints}; see {path} --help")  # type: ignore[attr-defined]
        return 2
    except BrokenPipeError:
        sys.stdout = None  # or Python tries once more to flush it, and complains
        return 1
    except (ValueError, OSError) as error:
        logging.getLogger("jaxinfer").debug("where it happened:", exc_info=True)
        file = getattr(error, "filename", None)  # what the system refuses, without "[Errno 2]"
        say_error(f"{file}: {getattr(error, 'strerror', error)}" if file else error)
        return 2
    return code or 0
