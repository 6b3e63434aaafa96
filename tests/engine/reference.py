"""Generation step by step, with a forward over the whole sequence each time: no cache, no batch, no device state."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxinfer import LLM, SamplingParams
from jaxinfer.attention import ForwardBatch
from jaxinfer.engine.bad_words import BadWords
from tests.sampling.reference import adjusted

_forwards: dict[int, Any] = {}


def all_logits(llm: LLM, tokens: list[int], length: int = 256) -> np.ndarray:
    """float32[len(tokens), V], in a stream of `length` tokens, so that it is compiled once for a model."""
    key = id(llm.engine)
    if key not in _forwards:
        _forwards[key] = llm, jax.jit(lambda params, batch: llm.model.bind(params)(batch, None)[0])
    batch = ForwardBatch.of_sequences([tokens], length)
    return np.asarray(_forwards[key][1](llm.engine.runner.params, batch))[: len(tokens)]


def greedy(
    llm: LLM, prompt: list[int], params: SamplingParams, stop_ids: tuple[int, ...] = ()
) -> tuple[list[int], np.ndarray]:
    """The tokens of greedy generation by numpy, and how far apart the two best logits were at each."""
    words = BadWords(params.bad_words or (), llm.tokenizer)
    bad_words = [*([i] for i in words.single), *words.sequences]
    output: list[int] = []
    gaps = []
    while len(output) < (params.max_tokens or 0) and not (output and output[-1] in stop_ids):
        logits = all_logits(llm, prompt + output)[-1]
        values = adjusted(logits, prompt, output, params, stop_ids, bad_words)
        second, best = np.sort(values)[-2:]
        gaps.append(best - second)
        output.append(int(values.argmax()))
    return output, np.array(gaps)


def same(ours: list[int], expected: list[int], gaps: np.ndarray) -> bool:
    """Equal, or different only from a place on where the two best logits lie within 1e-4."""
    for i, (a, b) in enumerate(zip(ours, expected, strict=False)):
        if a != b:
            return bool(gaps[i] < 1e-4)
    return len(ours) == len(expected)
