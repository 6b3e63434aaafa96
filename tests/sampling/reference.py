"""What vLLM's sampler keeps, in numpy by sorting: temperature, min_p, top_k, top_p, in this order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from jaxinfer import SamplingParams


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


def adjusted(
    logits: np.ndarray,
    prompt: list[int],
    output: list[int],
    params: SamplingParams,
    stop_ids: Iterable[int] = (),
    bad_words: Iterable[Sequence[int]] = (),
) -> np.ndarray:
    """float32[V]: one row's logits after masks, biases and penalties. bad_words: as token ids."""
    out = np.array(logits, np.float32)
    if params.allowed_token_ids is not None:
        out[[i for i in range(len(out)) if i not in params.allowed_token_ids]] = -np.inf
    for word in bad_words:
        if len(output) >= len(word) - 1 and list(word[:-1]) == output[len(output) - len(word) + 1 :]:
            out[word[-1]] = -np.inf
    for token, bias in (params.logit_bias or {}).items():
        out[token] += np.float32(bias)
    if len(output) < params.min_tokens:
        out[list(stop_ids)] = -np.inf
    for token in {*prompt, *output}:
        repetition = np.float32(params.repetition_penalty)
        out[token] = out[token] / repetition if out[token] > 0 else out[token] * repetition
    for token in set(output):
        out[token] -= np.float32(params.presence_penalty + params.frequency_penalty * output.count(token))
    return out
