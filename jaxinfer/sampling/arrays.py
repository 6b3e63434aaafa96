"""Sampling parameters as arrays, one entry a row, so that no mix of requests compiles anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from jaxinfer.sampling.params import MAX_STOP_IDS, SamplingParams


class RowSampling(NamedTuple):
    """One row's parameters as the engine has resolved them.

    seed: 64 bits. stop_ids: all ids that end this row. prompt_length: tokens of the prompt.
    """

    params: SamplingParams
    seed: int
    stop_ids: Sequence[int]
    prompt_length: int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingArrays:
    """temperature, top_p, min_p f32[R]; top_k i32[R], 0 for all; penalties f32[R, 3]: presence, frequency, repetition;
    seed u32[R, 2]; stop_ids i32[R, 8], -1 for none; prompt_length, min_tokens i32[R]; penalized, masked,
    wants_logprobs bool[R]: what of the rest of the device's state applies to a row."""

    temperature: jax.Array | np.ndarray
    top_k: jax.Array | np.ndarray
    top_p: jax.Array | np.ndarray
    min_p: jax.Array | np.ndarray
    penalties: jax.Array | np.ndarray
    seed: jax.Array | np.ndarray
    stop_ids: jax.Array | np.ndarray
    prompt_length: jax.Array | np.ndarray
    min_tokens: jax.Array | np.ndarray
    penalized: jax.Array | np.ndarray
    masked: jax.Array | np.ndarray
    wants_logprobs: jax.Array | np.ndarray

    @staticmethod
    def of_rows(rows: Sequence[RowSampling], size: int) -> SamplingArrays:
        """Arrays of `size` rows; those beyond the given ones are greedy and stop nowhere."""
        arrays = SamplingArrays(
            temperature=np.zeros(size, np.float32),
            top_k=np.zeros(size, np.int32),
            top_p=np.ones(size, np.float32),
            min_p=np.zeros(size, np.float32),
            penalties=np.tile(np.array([0, 0, 1], np.float32), (size, 1)),
            seed=np.zeros((size, 2), np.uint32),
            stop_ids=np.full((size, MAX_STOP_IDS), -1, np.int32),
            prompt_length=np.zeros(size, np.int32),
            min_tokens=np.zeros(size, np.int32),
            penalized=np.zeros(size, bool),
            masked=np.zeros(size, bool),
            wants_logprobs=np.zeros(size, bool),
        )
        for i, (params, seed, stop_ids, prompt_length) in enumerate(rows):
            arrays.temperature[i] = 0.0 if params.greedy else params.temperature
            arrays.top_k[i] = max(params.top_k, 0)
            arrays.top_p[i] = params.top_p
            arrays.min_p[i] = params.min_p
            arrays.penalties[i] = params.presence_penalty, params.frequency_penalty, params.repetition_penalty
            arrays.seed[i] = seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF
            arrays.stop_ids[i, : len(stop_ids)] = stop_ids
            arrays.prompt_length[i] = prompt_length
            arrays.min_tokens[i] = params.min_tokens
            arrays.penalized[i] = params.has_penalties
            arrays.masked[i] = params.has_masks
            arrays.wants_logprobs[i] = params.logprobs is not None
        return arrays
