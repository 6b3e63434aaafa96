"""What scores get by how far a key is from its query: biases of T5, MPNet and ALiBi, and DeBERTa's disentangled scores.

All of them are given in one form, by distance, which is key position - query position: what a layer adds is then looked
up, or multiplied, without regard to the rule that it was made by. Beyond the distances that are given, what is at the
end goes on; rules that never come to an end (ALiBi) are given for as many tokens as there are.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


class Relative(NamedTuple):
    """Of distances -(D - 1) to D - 1, in that order. Scores are
    `scale * (query . key + query . keys[distance] + queries[distance] . key)`, below a soft cap, `+ bias[distance]`.

    bias: f32[H, 2D-1], or None.
    keys: `[H, 2D-1, d]` in the activations' dtype, or None: DeBERTa's content to position.
    queries: likewise: its position to content.
    """

    bias: jax.Array | None = None
    keys: jax.Array | None = None
    queries: jax.Array | None = None


def distances(reach: int) -> np.ndarray:
    """i32[2 * reach - 1]: those of a `Relative` with D = reach."""
    return np.arange(1 - reach, reach, dtype=np.int32)


def t5_buckets(distance: np.ndarray, buckets: int = 32, furthest: int = 128, causal: bool = False) -> np.ndarray:
    """Which row of a table of `buckets` a distance has: each its own while near, then in steps that grow, until
    `furthest`, from where on all have one (Raffel et al., arXiv:1910.10683, section 2.1). Half of them are for keys
    after the query; causal: those have none of their own."""
    first = np.zeros_like(distance)
    if causal:
        size = np.maximum(-distance, 0)
    else:
        buckets //= 2
        first, size = np.where(distance > 0, buckets, 0).astype(distance.dtype), np.abs(distance)
    exact = buckets // 2
    ratio = np.log(np.maximum(size, exact).astype(np.float32) / np.float32(exact))
    grown = exact + (ratio / np.float32(math.log(furthest / exact)) * np.float32(buckets - exact)).astype(size.dtype)
    return first + np.where(size < exact, size, np.minimum(grown, buckets - 1))


def deberta_buckets(distance: np.ndarray, buckets: int, furthest: int) -> np.ndarray:
    """Which of 2 * span rows of position embeddings a distance has (He et al., arXiv:2006.03654, section 3.1; v2's are
    logarithmic): span is `buckets`, or `furthest` where that is not above 0 and each distance has its own. Query - key
    counts, and 0 is the middle."""
    span = buckets if buckets > 0 else furthest
    ahead = -distance
    if buckets > 0:
        middle = buckets // 2
        size = np.maximum(np.abs(ahead), middle).astype(np.float32)
        ratio = np.log(size / np.float32(middle)) / np.log(np.float32((furthest - 1) / middle))
        grown = np.ceil(ratio * np.float32(middle - 1)).astype(ahead.dtype) + middle
        ahead = np.where(np.abs(ahead) <= middle, ahead, grown * np.sign(ahead))
    return np.clip(ahead + span, 0, 2 * span - 1)


def alibi(slopes: ArrayLike, tokens: int) -> Relative:
    """Of slopes f32[H], for rows of at most so many tokens: the further, the less (Press et al., arXiv:2108.12409)."""
    away = np.abs(distances(tokens)).astype(np.float32)
    return Relative(-jnp.asarray(slopes, jnp.float32)[:, None] * away)
