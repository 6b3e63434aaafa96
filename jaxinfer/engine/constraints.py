"""Which tokens may come next, where that depends on all tokens so far: the host says it once they are known."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from jaxinfer.engine.guided.guide import Guide
from jaxinfer.engine.guided.guides import Guides
from jaxinfer.engine.request import Request
from jaxinfer.sampling.params import SamplingParams
from jaxinfer.sampling.slots import Masks

FORCED_ON_CPU = 4  # tokens: the smallest forward takes as long as about three steps of one


def guide_of(
    guides: Guides,
    params: SamplingParams,
    stop_ids: Sequence[int],
    always: Collection[int],
    prompt_length: int,
    vocab_size: int,
) -> Guide | None:
    """At the beginning of what is asked for, if anything is. Raises RequestError for what can't be followed, also where
    `always` and other parameters exclude all that it begins with."""
    guide = guides.guide(params, stop_ids)
    early = params.least(prompt_length) > 0
    if guide is not None and (params.has_masks or early):
        not_first = (*(stop_ids if early else ()), *(params.begin_suppress_tokens or ()))
        guide.check_first(Masks.of(vocab_size, params.allowed_token_ids, always, None, not_first).allowed[0])
    return guide


def fill_masks(guides: Guides, rows: Sequence[tuple[Request, int]], masks: np.ndarray) -> None:
    """A bit for each token that may come next, into each request's row of u32[R, V/32], all of whose bits are set."""
    guides.fill([(request.guide, row) for request, row in rows if request.guide is not None], masks)
    for request, row in rows:
        if request.exclusions is not None and request.exclusions.follows:
            tokens = np.fromiter(request.exclusions.forbidden(request.tokens), np.int64)
            np.bitwise_and.at(masks[row], tokens >> 5, ~(np.uint32(1) << (tokens & 31).astype(np.uint32)))


def forced_tokens(request: Request, room: int | None) -> list[int]:
    """The next tokens, where its grammar leaves no choice and it pays to take them for a chunk of a prompt.

    room: of the smallest forward, on a device on which larger ones take longer; None on others.
    """
    params, guide = request.params, request.guide
    if guide is None or guide.error is not None:
        return []
    if params.logprobs is not None or params.has_penalties or params.has_masks or request.scored_from is not None:
        return []  # the device has to see each, or the host has to wait for what it says of the prompt
    left = request.limit - len(request.tokens)
    tokens = guide.forced()[:left]
    pays = len(tokens) > 1 if room is None else FORCED_ON_CPU <= len(tokens) <= room
    # Those that end the text are free: nothing comes after them.
    return tokens if tokens and (pays or len(tokens) == left or guide.ends_with(tokens)) else []
