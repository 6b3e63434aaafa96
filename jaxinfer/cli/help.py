"""`jaxinfer help`."""

from __future__ import annotations

from typing import Annotated

import typer


def help(
    command: Annotated[list[str] | None, typer.Argument(metavar="COMMAND", show_default=False)] = None,
) -> None:
    """Show what a command is for and what it takes, as COMMAND --help does."""
    from jaxinfer.cli import app

    app([*(command or []), "--help"], prog_name="jaxinfer", standalone_mode=False)
