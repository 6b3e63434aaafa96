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

    seed: 64 bits. stop_ids: all ids that end this row. min_length: stop ids are masked while the sequence
    (prompt and output) is shorter than this.
    """

    params: SamplingParams
    seed: int
    stop_ids: Sequence[int]
    min_length: int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingArrays:
    """temperature, top_p, min_p f32[R]; top_k i32[R], 0 for all; seed u32[R, 2]; stop_ids i32[R, 8], -1 for none;
    min_length i32[R]; wants_logprobs bool[R]."""

    temperature: jax.Array | np.ndarray
    top_k: jax.Array | np.ndarray
    top_p: jax.Array | np.ndarray
    min_p: jax.Array | np.ndarray
    seed: jax.Array | np.ndarray
    stop_ids: jax.Array | np.ndarray
    min_length: jax.Array | np.ndarray
    wants_logprobs: jax.Array | np.ndarray

    @staticmethod
    def of_rows(rows: Sequence[RowSampling], size: int) -> SamplingArrays:
        """Arrays of `size` rows; those beyond the given ones are greedy and stop nowhere."""
        arrays = SamplingArrays(
            temperature=np.zeros(size, np.float32),
            top_k=np.zeros(size, np.int32),
            top_p=np.ones(size, np.float32),
            min_p=np.zeros(size, np.float32),
            seed=np.zeros((size, 2), np.uint32),
            stop_ids=np.full((size, MAX_STOP_IDS), -1, np.int32),
            min_length=np.zeros(size, np.int32),
            wants_logprobs=np.zeros(size, bool),
        )
        for i, (params, seed, stop_ids, min_length) in enumerate(rows):
            arrays.temperature[i] = 0.0 if params.greedy else params.temperature
            arrays.top_k[i] = max(params.top_k, 0)
            arrays.top_p[i] = params.top_p
            arrays.min_p[i] = params.min_p
            arrays.seed[i] = seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF
            arrays.stop_ids[i, : len(stop_ids)] = stop_ids
            arrays.min_length[i] = min_length
            arrays.wants_logprobs[i] = params.logprobs is not None
        return arrays
