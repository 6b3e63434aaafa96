"""Columns that no row has, or that every row has and should not: found before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from itertools import islice

from jaxinfer.batch.parse import Parser
from jaxinfer.batch.readers import records
from jaxinfer.batch.results import Results, clash
from jaxinfer.batch.sources import STDIN, Source

ROWS = 100  # that are looked at, of each file


def check_columns(sources: Sequence[Source], parser: Parser, results: Results) -> None:
    """Raises ValueError if none of a file's first rows has a column of the prompt template, or if each of them has one
    that is called like a result. Stdin, which can't be read twice, is not looked at."""
    for source in sources:
        if source.url == STDIN:
            continue
        rows = []
        with suppress(OSError):  # of a file that is damaged: what was read before is run, and then it shows
            for record in islice(records([source]), ROWS):
                rows.append(parser.parse(record))
        rows = [row for row in rows if row.columns]
        there = dict.fromkeys(column for row in rows for column in row.columns)
        for column in sorted(parser.template_columns):
            if rows and column not in there:
                raise ValueError(
                    f"{source.name}: no column {column!r}, which the prompt template takes; "
                    f"there are {', '.join(map(repr, there)) or 'none'}"
                )
        taken = [results.taken(row.columns) for row in rows]
        for column in there:
            if all(column in names for names in taken):
                raise ValueError(f"{source.name}: {clash(column)}")
