"""What is static about one layer's attention."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionSpec:
    """Static facts of one attention layer.

    scale: the scores are `scale * q . k`.
    causal: token i sees only positions <= i.
    window: None, or token i sees only positions > i - window (transformers' sliding window).
    chunk: None, or token i sees only positions from i - i % chunk on (Llama 4).
    soft_cap: None, or scores stay below it, by a tanh (Gemma 2).
    writes: a cache gets the layer's keys and values; else they are there already, another layer's of the same step.
    """

    scale: float
    causal: bool = True
    window: int | None = None
    chunk: int | None = None
    soft_cap: float | None = None
    writes: bool = True
