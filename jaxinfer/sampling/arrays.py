"""Sampling parameters as arrays, one entry a row, so that no mix of requests compiles anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np

from jaxinfer.sampling.params import MAX_STOP_IDS, SamplingParams


@dataclass(frozen=True)
class RowSampling:
    """One row's parameters as the engine has resolved them.

    params: the rest of them.
    seed: 64 bits.
    stop_ids: all ids that end this row.
    prompt_length: tokens of the prompt.
    limit: the most that prompt and output may have.
    table: which ends of its grammar's table end it; 0 where it has none.
    """

    params: SamplingParams
    seed: int
    stop_ids: Sequence[int]
    prompt_length: int
    limit: int = 0
    table: int = 0

    @cached_property
    def packed(self) -> tuple[tuple[float, ...], tuple[int, ...], tuple[int, int], tuple[bool, ...]]:
        """Its rows of `floats`, `ints`, `seed` and `flags`."""
        return _floats(self), _ints(self), (self.seed >> 32 & 0xFFFFFFFF, self.seed & 0xFFFFFFFF), _flags(self.params)


def _column(of: str, *at: int) -> Any:
    """A property: one column of a packed array, or those from one on to before another."""
    return property(lambda self: getattr(self, of)[:, slice(*at) if len(at) > 1 else at[0]])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingArrays:
    """Packed, as each array that a call is given takes the host time.

    floats: f32[R, 11]: temperature, top_p, min_p; penalties [R, 3]: presence, frequency, repetition; cutoffs [R, 3]:
        typical_p, epsilon, eta; decay [R, 2]: the length from which on stop ids gain, and their factor.
    ints: i32[R, 9]: top_k, 0 for all; prompt_length; min_tokens; begin, the length at which begin_suppress_tokens
        count; forced [R, 2, 2]: a length (-1 for never) and the token that follows so many, twice; table: from which
        one on ends of its grammar's table end it (FORCED or COMPLETE), 0 where it has none.
    seed: u32[R, 2].
    stop_ids: i32[R, 8], -1 for none.
    flags: bool[R, 3]: penalized, masked, wants_logprobs: what of the rest of the device's state applies to a row.
    """

    floats: jax.Array | np.ndarray
    ints: jax.Array | np.ndarray
    seed: jax.Array | np.ndarray
    stop_ids: jax.Array | np.ndarray
    flags: jax.Array | np.ndarray

    temperature = _column("floats", 0)
    top_p = _column("floats", 1)
    min_p = _column("floats", 2)
    penalties = _column("floats", 3, 6)
    cutoffs = _column("floats", 6, 9)
    decay = _column("floats", 9, 11)
    top_k = _column("ints", 0)
    prompt_length = _column("ints", 1)
    min_tokens = _column("ints", 2)
    begin = _column("ints", 3)
    table = _column("ints", 8)
    penalized = _column("flags", 0)
    masked = _column("flags", 1)
    wants_logprobs = _column("flags", 2)

    @property
    def forced(self) -> Any:
        return self.ints[:, 4:8].reshape(-1, 2, 2)

    @staticmethod
    def of_rows(rows: Sequence[RowSampling], size: int) -> SamplingArrays:
        """Arrays of `size` rows; those beyond the given ones are greedy and stop nowhere."""
        floats = np.tile(np.array([0, 1, 0, 0, 0, 1, 1, 0, 0, 0, 1], np.float32), (size, 1))
        ints = np.tile(np.array([0, 0, 0, 0, -1, -1, -1, -1, 0], np.int32), (size, 1))
        seed = np.zeros((size, 2), np.uint32)
        stop_ids = np.full((size, MAX_STOP_IDS), -1, np.int32)
        flags = np.zeros((size, 3), bool)
        if rows:  # at once: numpy takes its time for each assignment
            packed = zip(*(row.packed for row in rows), strict=True)
            for array, values in zip((floats, ints, seed, flags), packed, strict=True):
                array[: len(rows)] = values
        for i, row in enumerate(rows):
            if row.stop_ids:
                stop_ids[i, : len(row.stop_ids)] = row.stop_ids
        return SamplingArrays(floats, ints, seed, stop_ids, flags)


def _flags(params: SamplingParams) -> tuple[bool, ...]:
    return params.has_penalties, params.has_masks, params.logprobs is not None


def _floats(row: RowSampling) -> tuple[float, ...]:
    params = row.params
    start, factor = params.exponential_decay_length_penalty or (0, 1.0)
    return (
        0.0 if params.greedy else params.temperature,
        params.top_p,
        params.min_p,
        params.presence_penalty,
        params.frequency_penalty,
        params.repetition_penalty,
        params.typical_p,
        params.epsilon_cutoff,
        params.eta_cutoff,
        row.prompt_length + start,
        factor,
    )


def _ints(row: RowSampling) -> tuple[int, ...]:
    params, length = row.params, row.prompt_length
    first = params.forced_bos_token_id if length == 1 else None
    last = params.forced_eos_token_id
    return (
        max(params.top_k, 0),
        length,
        params.least(length),
        length + (first is not None),  # as in transformers, where one that is forced does not count as the first
        *((-1, -1) if first is None else (length, first)),
        *((-1, -1) if last is None else (row.limit - 1, last)),
        row.table,
    )
