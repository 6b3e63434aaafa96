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
from typing import Annotated, cast

import typer

from jaxinfer import __version__
from jaxinfer.cli.console import say_error

# A new command is a line here and a file beside this one.
COMMANDS = (
    "generate",
    "chat",
    "batch",
    "score",
    "bench",
    "plan",
    "compile",
    "compare",
    "convert",
    "quantize",
    "lm-eval",
    "models",
    "doctor",
)

app = typer.Typer(name="jaxinfer", add_completion=False, pretty_exceptions_enable=False)
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line (default: the process's, which then ends here) and returns its exit code.

    2 after one line on stderr for what the user can put right (ValueError, OSError), 130 after Ctrl-C, 1 when nobody
    reads the output any more. Whatever else is raised is a bug and gets through.
    """
    code = _run(arguments)
    if arguments is None and code > 128:
        _leave(code)
    return code


def _leave(code: int) -> None:
    """After a signal: ends the process now if programs are being compiled, which Python would wait for."""
    from jaxinfer import distributed
    from jaxinfer.engine import background

    if background.running():
        if (group := distributed.group()) is not None:
            group.end()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def _run(arguments: Sequence[str] | None) -> int:
    try:
        code = app(arguments, prog_name="jaxinfer", standalone_mode=False)  # KeyboardInterrupt becomes 130 in there
        sys.stdout.flush()
    except UsageError as error:
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "jaxinfer"
        say_error(f"{error.format_message().rstrip('.')}; see {path} --help")  # type: ignore[attr-defined]
        return 2
    except BrokenPipeError:
        sys.stdout = None  # or Python tries once more to flush it, and complains
        return 1
    except (ValueError, OSError) as error:
        logging.getLogger("jaxinfer").debug("where it happened:", exc_info=True)
        say_error(error)
        return 2
    return code or 0
