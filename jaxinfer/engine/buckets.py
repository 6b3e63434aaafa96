"""Every shape that can occur: a finite table, known before the first request."""

from __future__ import annotations

from dataclasses import dataclass

SMALL_ROWS = 16  # a call for a few prompts need not compute logits for all
SMALLEST_TOKENS = 32
ROWS_AT_ONCE = 8  # that an accelerator multiplies in the time of one


@dataclass(frozen=True)
class Buckets:
    """Sizes of calls, in ascending order.

    decode: rows of decoding calls.
    full_decode: the same where not all rows are plain (`SamplingParams.is_plain`).
    tokens: of forwards.
    sample: rows that are sampled after them.
    """

    decode: tuple[int, ...]
    full_decode: tuple[int, ...]
    tokens: tuple[int, ...]
    sample: tuple[int, ...]

    @classmethod
    def make(cls, max_rows: int, max_tokens: int, platform: str = "cpu") -> Buckets:
        """Powers of two up to the limits, which are the last entries; of four for rows on an accelerator, which reads
        its weights for as long as it multiplies some hundred rows."""
        on_cpu = platform == "cpu"
        decode = powers(1, max_rows, 2) if on_cpu else powers(min(ROWS_AT_ONCE, max_rows), max_rows, 4)
        sample = (max_rows,) if max_rows <= SMALL_ROWS else (SMALL_ROWS, max_rows)
        # Few tokens are not worth a program of their own on a device that is made for many rows.
        tokens = powers(min(max(SMALLEST_TOKENS, max_rows // 4), max_tokens), max_tokens, 2)
        # What is seldom asked for has half as many sizes: each takes longest to compile.
        return cls(decode, decode[::-2][::-1], tokens, sample)

    @staticmethod
    def fit(table: tuple[int, ...], count: int) -> int:
        """The smallest entry that holds `count`."""
        for size in table:
            if count <= size:
                return size
        raise ValueError(f"{count} is more than the largest bucket, {table[-1]}")


def powers(first: int, last: int, base: int) -> tuple[int, ...]:
    sizes = []
    while first < last:
        sizes.append(first)
        first *= base
    return (*sizes, last)
