"""What stays on the device for each running sequence between calls: its last token and what bears on its logits.

A sequence keeps its slot while it runs. The last slot is nobody's: unused rows of a batch point there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jaxinfer.sampling.params import MAX_LOGIT_BIAS
from jaxinfer.sharding import ROWS, TENSOR, axis_size


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """S slots, V tokens in the vocabulary. token i32[S]: the last one sampled. alive bool[S]: whether it goes on.
    in_prompt bool[S, V] and in_output i16[S, V], how often: kept for rows with penalties only.
    allowed u32[S, V/32], a bit a token, bias_ids i32[S, B] (V for none) and bias f32[S, B]: for masked rows only."""

    token: jax.Array
    alive: jax.Array
    in_prompt: jax.Array
    in_output: jax.Array
    allowed: jax.Array
    bias_ids: jax.Array
    bias: jax.Array

    @staticmethod
    def shapes(slots: int, vocab: int) -> Slots:
        """As abstract arrays, for `slots` sequences and the one slot that is nobody's."""

        def array(dtype: str, *shape: int) -> jax.Array:
            return jax.ShapeDtypeStruct((slots + 1, *shape), jnp.dtype(dtype))  # type: ignore[return-value]

        return Slots(
            token=array("int32"),
            alive=array("bool"),
            in_prompt=array("bool", vocab),
            in_output=array("int16", vocab),
            allowed=array("uint32", -(-vocab // 32)),
            bias_ids=array("int32", MAX_LOGIT_BIAS),
            bias=array("float32", MAX_LOGIT_BIAS),
        )

    @staticmethod
    def specs(vocab: int, mesh: Mesh) -> dict[str, PartitionSpec]:
        """How each array is split over a mesh: as rows are, and as the logits' vocabulary is."""
        whole, parts = PartitionSpec(ROWS), PartitionSpec(ROWS, TENSOR)
        by_token = whole if vocab % axis_size(mesh, TENSOR) else parts
        names = (one.name for one in fields(Slots))
        return {name: by_token if name in ("in_prompt", "in_output") else whole for name in names}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Masks:
    """What of one sequence's slot the host decides: see Slots."""

    allowed: np.ndarray
    bias_ids: np.ndarray
    bias: np.ndarray

    @staticmethod
    def of(
        vocab: int, allowed: Sequence[int] | None, forbidden: Sequence[int], bias: Mapping[int, float] | None
    ) -> Masks:
        """Allowed tokens (None for all) without the forbidden ones, and biases."""
        bits = np.zeros(-(-vocab // 32) * 32, bool)
        bits[:vocab] = allowed is None
        bits[list(allowed or ())] = True
        bits[list(forbidden)] = False
        ids = np.full(MAX_LOGIT_BIAS, vocab, np.int32)
        values = np.zeros(MAX_LOGIT_BIAS, np.float32)
        for i, (token, value) in enumerate((bias or {}).items()):
            ids[i], values[i] = token, value
        words = np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)
        return Masks(words, ids, values)


def prepare_slot(slots: Slots, slot: jax.Array, masks: Masks, clear: jax.Array) -> Slots:
    """The slots with new masks in one of them; `clear`: for a new sequence, of which no tokens have been seen."""
    return Slots(
        token=slots.token,
        alive=slots.alive,
        in_prompt=slots.in_prompt.at[slot].set(slots.in_prompt[slot] & ~clear),
        in_output=slots.in_output.at[slot].set(jnp.where(clear, jnp.int16(0), slots.in_output[slot])),
        allowed=slots.allowed.at[slot].set(masks.allowed),
        bias_ids=slots.bias_ids.at[slot].set(masks.bias_ids),
        bias=slots.bias.at[slot].set(masks.bias),
    )
