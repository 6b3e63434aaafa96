"""Prompt templates of batch jobs: text with `{column}` in it."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from typing import Any


class PromptTemplate:
    """`"Translate: {text}"`, filled from a row's columns; `{{` and `}}` are braces.

    A field is the name of a column and nothing else: no attributes, indices, conversions or formats, which in
    `str.format` reach more than the value. Text goes in as it is, anything else as JSON.
    Raises ValueError for a template with anything else in its braces, or without a field.
    """

    def __init__(self, template: str):
        self._parts: list[tuple[str, str | None]] = []  # text, and the column after it
        where = f"prompt template {template!r:.80}"
        try:
            parsed = list(string.Formatter().parse(template))
        except ValueError as error:
            raise ValueError(f"{where}: {error}; write {{{{ and }}}} for braces, {{column}} for a column") from None
        for text, name, form, conversion in parsed:
            if name is not None and (
                not name.strip() or name.isdigit() or set(name) & set(".[]{}") or form or conversion
            ):
                raise ValueError(f"{where}: {{{name}}} must be a column's name and nothing else; {{{{ is a brace")
            self._parts.append((text, name))
        if not self.columns:
            raise ValueError(f"{where}: no {{column}} is in it, so all prompts would be the same")

    @property
    def columns(self) -> set[str]:
        """The columns that it takes."""
        return {name for _, name in self._parts if name is not None}

    def fill(self, columns: Mapping[str, Any]) -> str:
        """The prompt of a row. Raises ValueError for a column that is not there, or is null."""
        return "".join(text + (_value(columns, name) if name is not None else "") for text, name in self._parts)


def _value(columns: Mapping[str, Any], name: str) -> str:
    value = columns.get(name)
    if value is None:
        there = ", ".join(map(repr, columns))
        problem = "is null" if name in columns else f"is not there; there are {there}"
        raise ValueError(f"column {name!r} of the prompt template {problem}")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
