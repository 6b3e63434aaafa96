"""Options for structured output."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

PANEL = "Structured output (one of these)"


@dataclass(frozen=True)
class GuidedOptions:
    """What answers must look like; None is not given."""

    json_schema: Annotated[
        str | None, typer.Option(metavar="FILE", help="Answers are JSON of this schema.", rich_help_panel=PANEL)
    ] = None
    regex: Annotated[
        str | None,
        typer.Option(metavar="R", help="Answers match this regular expression as a whole.", rich_help_panel=PANEL),
    ] = None
    choice: Annotated[
        list[str] | None,
        typer.Option(metavar="S", help="Answers are one of these; to be repeated.", rich_help_panel=PANEL),
    ] = None
    grammar: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Answers follow a Lark, GBNF or EBNF grammar.", rich_help_panel=PANEL),
    ] = None

    @property
    def changes(self) -> dict[str, Any]:
        """As a sampling parameter, if one is given. Raises ValueError and OSError."""
        files = {"json": ("--json-schema", self.json_schema), "grammar": ("--grammar", self.grammar)}
        fields: dict[str, Any] = {name: _content(*file) for name, file in files.items() if file[1] is not None}
        fields |= {"regex": self.regex} if self.regex is not None else {}
        fields |= {"choice": self.choice} if self.choice else {}
        return {"structured_outputs": fields} if fields else {}


def _content(option: str, file: str | None) -> str:
    try:
        return Path(str(file)).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{option} {file}: not UTF-8; give a text file") from None
