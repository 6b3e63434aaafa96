"""The rows of files, one after the other, in constant memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from jaxinfer.batch.row import Record
from jaxinfer.batch.sources import Source


def records(sources: Sequence[Source], start: int = 0) -> Iterator[Record]:
    """The rows of all sources from number `start` on. Raises ValueError or OSError for a file that can't be read on."""
    raise NotImplementedError


def count_rows(sources: Sequence[Source]) -> int | None:
    """How many rows there are, for a progress bar; None where finding out would need stdin or a download."""
    raise NotImplementedError
