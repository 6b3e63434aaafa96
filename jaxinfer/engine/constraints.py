"""Which tokens may come next, where that depends on all tokens so far: the host says it once they are known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxinfer.engine.guided.guide import Guides
from jaxinfer.engine.request import Request


def fill_masks(guides: Guides, rows: Sequence[tuple[Request, int]], masks: np.ndarray) -> None:
    """A bit for each token that may come next, into each request's row of u32[R, V/32], all of whose bits are set."""
    guides.fill([(request.guide, row) for request, row in rows if request.guide is not None], masks)
    for request, row in rows:
        if request.exclusions is not None and request.exclusions.follows:
            tokens = np.fromiter(request.exclusions.forbidden(request.tokens), np.int64)
            np.bitwise_and.at(masks[row], tokens >> 5, ~(np.uint32(1) << (tokens & 31).astype(np.uint32)))
