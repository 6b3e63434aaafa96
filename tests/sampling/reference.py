"""What vLLM's sampler keeps, in numpy by sorting: temperature, min_p, top_k, top_p, in this order."""

from __future__ import annotations

import numpy as np


def kept(logits: np.ndarray, temperature: float, min_p: float, top_k: int, top_p: float) -> np.ndarray:
    """bool[V]: the tokens of one row that may be drawn. Ties with the last one kept are kept."""
    scaled = np.asarray(logits, np.float32) / np.float32(temperature)
    stay = np.isfinite(scaled)
    probabilities = softmax(scaled)
    stay &= probabilities >= min_p * probabilities.max()
    if 0 < top_k < len(scaled):
        stay &= scaled >= np.sort(np.where(stay, scaled, -np.inf))[-top_k]
    if top_p < 1:
        values = np.where(stay, scaled, -np.inf)
        order = np.argsort(-values, kind="stable")
        before = np.cumsum(softmax(values)[order]) - softmax(values)[order]
        stay &= scaled >= values[order[before < top_p]].min()
    return stay


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return weights / weights.sum()


def distribution(logits: np.ndarray, temperature: float, min_p: float, top_k: int, top_p: float) -> np.ndarray:
    """float64[V]: the probability of each token."""
    stay = kept(logits, temperature, min_p, top_k, top_p)
    return softmax(np.where(stay, np.asarray(logits, np.float32) / np.float32(temperature), -np.inf))
