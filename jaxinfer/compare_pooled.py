"""The price of fewer bits for models that make vectors or classes: how far those of given texts move from float32's."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxinfer.llm import LLM
from jaxinfer.models.tasks import EMBED
from jaxinfer.tasks.embed import normalized

RUNS = 3
Floats = np.ndarray[Any, Any]


@dataclass(frozen=True)
class VectorPrice:
    """What a scheme costs where vectors are made, and what it saves.

    scheme: None for float32, which the others are compared with.
    texts: whose vectors were compared.
    cosine_min, cosine_mean: of the angles between the scheme's vectors and float32's, the worst and the mean.
    nearest: share of texts with the same text nearest to them.
    rank: how far similarities to all other texts are in the same order: Spearman's coefficient, the mean of all texts.
    weight_bytes: of all weights.
    rate: texts/s, the median of three.
    exact_match: the share of right answers, where questions are given.
    """

    scheme: str | None
    texts: int
    cosine_min: float
    cosine_mean: float
    nearest: float
    rank: float
    weight_bytes: int
    rate: float
    exact_match: float | None


@dataclass(frozen=True)
class ClassPrice:
    """The same where texts are classified.

    same: share of texts with the same class.
    change_max, change_mean: how much of a text's probability goes to other classes (total variation), at most and on
        the average.
    """

    scheme: str | None
    texts: int
    same: float
    change_max: float
    change_mean: float
    weight_bytes: int
    rate: float
    exact_match: float | None


def pooled_price(
    llm: LLM, scheme: str | None, texts: Sequence[str], base: Floats | None, right: Callable[[LLM], float] | None
) -> tuple[VectorPrice | ClassPrice, Floats]:
    """The price, and the model's own numbers f32[texts, N]. base: float32's; None: these are."""
    ours, rate = _numbers(llm, texts)
    theirs = ours if base is None else base
    if theirs.shape != ours.shape:
        raise ValueError(f"{scheme}: makes {ours.shape[1]} numbers of a text, not {theirs.shape[1]}: another model")
    assert llm._pooling is not None
    nbytes, answers = sum(array.nbytes for array in llm._pooling.params.values()), None if right is None else right(llm)
    if llm.task != EMBED:
        change = np.abs(ours - theirs).sum(axis=1) / 2
        same = float(np.mean(np.argmax(ours, axis=1) == np.argmax(theirs, axis=1)))
        moved = float(change.max()), float(change.mean())
        return ClassPrice(scheme, len(ours), same, *moved, nbytes, rate, answers), ours
    cosines = np.sum(normalized(ours.astype(np.float64)) * normalized(theirs.astype(np.float64)), axis=1)
    angles = float(cosines.min()), float(cosines.mean())
    return VectorPrice(scheme, len(ours), *angles, *agreement(ours, theirs), nbytes, rate, answers), ours


def agreement(ours: Floats, theirs: Floats) -> tuple[float, float]:
    """Of vectors f32[texts, D]: the share with the same nearest neighbour by cosine, and Spearman's coefficient of the
    similarities to all others, the mean of all texts. Of fewer than three texts there is one order: both are 1."""
    if len(ours) < 3:
        return 1.0, 1.0
    others = ~np.eye(len(ours), dtype=bool)
    orders = []
    for vectors in (ours, theirs):
        unit = normalized(vectors.astype(np.float64))
        similarities = (unit @ unit.T)[others].reshape(len(unit), -1)
        orders.append(np.argsort(np.argsort(similarities, axis=1), axis=1).astype(np.float64))
    first, second = orders
    nearest = np.mean(np.argmax(first, axis=1) == np.argmax(second, axis=1))
    middle = (first.shape[1] - 1) / 2
    rank = np.sum((first - middle) * (second - middle), axis=1) / np.sum((first - middle) ** 2, axis=1)
    return float(nearest), float(rank.mean())


def _numbers(llm: LLM, texts: Sequence[str]) -> tuple[Floats, float]:
    """Vectors or probabilities, and texts/s."""
    times = []
    for _ in range(1 + RUNS):
        start = time.perf_counter()
        if llm.task == EMBED:
            rows = [output.outputs.embedding for output in llm.embed(texts, truncate=True, use_tqdm=False)]
        else:
            rows = [output.outputs.probs for output in llm.classify(texts, truncate=True, use_tqdm=False)]
        times.append(time.perf_counter() - start)
    return np.stack(rows), len(texts) / float(np.median(times[1:]))
