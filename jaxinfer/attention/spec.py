"""What is static about one layer's attention."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionSpec:
    """Static facts of one attention layer.

    scale: the scores are `scale * q . k`.
    causal: token i sees only positions <= i.
    window: None, or token i sees only positions > i - window (transformers' sliding window).
    """

    scale: float
    causal: bool = True
    window: int | None = None
