"""Texts to numbers of each of their tokens: hidden states, or classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from jaxinfer.engine.outputs import PoolingOutput, PoolingRequestOutput
from jaxinfer.engine.pooling.packing import Row
from jaxinfer.tasks.embed import not_finite
from jaxinfer.tasks.pooling import PoolingTask

TokensOutput = PoolingRequestOutput[PoolingOutput]


class TokenOptions(NamedTuple):
    """What becomes of the numbers f32[tokens, N] of a text.

    finish: of all of them, what is given.
    tag: only tokens of this id are; None: all.
    columns: of each only those at these places; None: all.
    """

    finish: Callable[[np.ndarray], np.ndarray]
    tag: int | None = None
    columns: list[int] | None = None


class TokenTask(PoolingTask[TokensOutput]):
    """Of any model."""

    pairs = True
    of_tokens = True

    def outputs(self, rows: list[Row], values: list[np.ndarray], options: TokenOptions) -> Iterator[TokensOutput]:
        for row, numbers in zip(rows, values, strict=True):
            if options.tag is not None:
                numbers = numbers[np.asarray(row.ids) == options.tag]
            data = options.finish(numbers)
            data = np.array(data if options.columns is None else data[:, options.columns], order="C")  # of its own
            error = None if np.isfinite(data).all() else not_finite("output")
            yield TokensOutput(row.place, row.ids, row.place, error, outputs=PoolingOutput(data))

    def failure(self, index: int, error: str) -> TokensOutput:
        return TokensOutput(-1, [], index, error, outputs=PoolingOutput(np.zeros((0, 0), np.float32)))
