"""Every shape that can occur: a finite table, known before the first request."""

from __future__ import annotations

from dataclasses import dataclass

SMALL_ROWS = 16  # a call for a few prompts need not compute logits for all
SMALLEST_TOKENS = 32


@dataclass(frozen=True)
class Buckets:
    """Sizes of calls, in ascending order.

    decode: rows of decoding calls.
    tokens: of forwards.
    sample: rows that are sampled after them.
    """

    decode: tuple[int, ...]
    tokens: tuple[int, ...]
    sample: tuple[int, ...]

    @classmethod
    def make(cls, max_rows: int, max_tokens: int) -> Buckets:
        """Powers of two up to the limits, which are the last entries."""
        sample = (max_rows,) if max_rows <= SMALL_ROWS else (SMALL_ROWS, max_rows)
        # Few tokens are not worth a program of their own on a device that is made for many rows.
        tokens = _powers(min(max(SMALLEST_TOKENS, max_rows // 4), max_tokens), max_tokens)
        return cls(_powers(1, max_rows), tokens, sample)

    @staticmethod
    def fit(table: tuple[int, ...], count: int) -> int:
        """The smallest entry that holds `count`."""
        for size in table:
            if count <= size:
                return size
        raise ValueError(f"{count} is more than the largest bucket, {table[-1]}")


def _powers(first: int, last: int) -> tuple[int, ...]:
    sizes = []
    while first < last:
        sizes.append(first)
        first *= 2
    return (*sizes, last)
