"""What stays on the device for each running sequence between calls: its last token and what bears on its logits.

A sequence keeps its slot while it runs. The last slot is nobody's: unused rows of a batch point there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxinfer.sampling.params import MAX_LOGIT_BIAS, MOST_COPIES
from jaxinfer.sampling.table_sizes import BLOCKS
from jaxinfer.sampling.tables import TokenTables
from jaxinfer.sharding import ROWS, TENSOR, axis_size


def mask_words(vocab: int) -> int:
    """How many words of 32 bits have a bit for each token."""
    return -(-vocab // 32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """Arrays over S slots; V tokens are in the vocabulary.

    token: i32[S], the last one sampled.
    alive: bool[S], whether it goes on.
    in_prompt: bool[S, V], for rows with penalties only.
    in_output: u16[S, V], how often (see `count`), likewise.
    allowed: u32[S, 2, V/32], a bit a token, first of the token at which `SamplingArrays.begin` is, then of all others;
        for masked rows only.
    bias_ids: i32[S, B], V for none; for masked rows only.
    bias: f32[S, B], likewise.
    place: i32[S], the state in `tables`, for rows with a table only.
    tables: of grammars; the same for all slots.
    """

    token: jax.Array
    alive: jax.Array
    in_prompt: jax.Array
    in_output: jax.Array
    allowed: jax.Array
    bias_ids: jax.Array
    bias: jax.Array
    place: jax.Array
    tables: TokenTables

    @staticmethod
    def shapes(slots: int, vocab: int, shards: int = 1) -> DecodeState:
        """As abstract arrays, for `slots` sequences and the one slot that is nobody's; each shard has its tables."""

        def array(dtype: str, *shape: int) -> jax.Array:
            return jax.ShapeDtypeStruct((slots + 1, *shape), jnp.dtype(dtype))  # type: ignore[return-value]

        return DecodeState(
            token=array("int32"),
            alive=array("bool"),
            in_prompt=array("bool", vocab),
            in_output=array("uint16", vocab),
            allowed=array("uint32", 2, mask_words(vocab)),
            bias_ids=array("int32", MAX_LOGIT_BIAS),
            bias=array("float32", MAX_LOGIT_BIAS),
            place=array("int32"),
            tables=TokenTables.shapes(vocab, shards * BLOCKS),
        )

    @staticmethod
    def specs(vocab: int, mesh: Mesh) -> dict[str, PartitionSpec]:
        """How each array is split over a mesh: as rows are, and as the logits' vocabulary is."""
        whole, parts = PartitionSpec(ROWS), PartitionSpec(ROWS, TENSOR)
        by_token = whole if vocab % axis_size(mesh, TENSOR) else parts
        names = (field.name for field in fields(DecodeState))
        return {name: by_token if name in ("in_prompt", "in_output") else whole for name in names}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Masks:
    """What of one sequence's slot the host decides.

    allowed, bias_ids, bias: see DecodeState.
    """

    allowed: np.ndarray
    bias_ids: np.ndarray
    bias: np.ndarray

    @staticmethod
    def of(
        vocab: int,
        allowed: Sequence[int] | None,
        forbidden: Collection[int],
        bias: Mapping[int, float] | None,
        not_first: Collection[int] = (),
    ) -> Masks:
        """Allowed tokens (None for all) without the forbidden ones, and at the beginning without `not_first`, and
        biases."""
        bits = np.zeros((2, mask_words(vocab) * 32), bool)
        bits[:, :vocab] = allowed is None
        bits[:, list(allowed or ())] = True
        bits[:, list(forbidden)] = False
        bits[0, list(not_first)] = False
        ids = np.full(MAX_LOGIT_BIAS, vocab, np.int32)
        values = np.zeros(MAX_LOGIT_BIAS, np.float32)
        for i, (token, value) in enumerate((bias or {}).items()):
            ids[i], values[i] = token, value
        words = np.packbits(bits, axis=1, bitorder="little").view("<u4").astype(np.uint32)
        return Masks(words, ids, values)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TablePlaces:
    """Where sequences are in their grammars' tables.

    place: i32[R], see DecodeState.
    """

    place: np.ndarray


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenCounts:
    """What penalties of a sequence begin with: its tokens so far.

    in_prompt, in_output: see DecodeState.
    """

    in_prompt: np.ndarray
    in_output: np.ndarray

    @staticmethod
    def of(vocab: int, prompt: Sequence[int], output: Sequence[int]) -> TokenCounts:
        """Those of these ids."""
        in_prompt = np.zeros(vocab, bool)
        in_prompt[list(prompt)] = True
        counts = np.bincount(np.array(output, np.int64), minlength=vocab)
        return TokenCounts(in_prompt, np.minimum(counts, MOST_COPIES).astype(np.uint16))


def prepare_slot(slots: DecodeState, slot: jax.Array, values: Masks | TokenCounts | TablePlaces) -> DecodeState:
    """The slots with these in one of them, or in some."""
    arrays = {field.name: getattr(values, field.name) for field in fields(values)}
    return replace(slots, **{name: getattr(slots, name).at[slot].set(value) for name, value in arrays.items()})


def count(in_output: jax.Array, slot: jax.Array, tokens: jax.Array, wanted: jax.Array) -> jax.Array:
    """`in_output` with these tokens counted, i32[T] all, where `wanted`. A count may end beyond MOST_COPIES, where it
    is read as that, and never overflows: so few tokens are added at a time."""
    nobody = in_output.shape[0]
    for start in range(0, tokens.shape[0], MOST_COPIES - 1):
        some = slice(start, start + MOST_COPIES - 1)
        in_output = _count(in_output, jnp.where(wanted[some], slot[some], nobody), tokens[some])
    return in_output


def _count(in_output: jax.Array, slot: jax.Array, tokens: jax.Array) -> jax.Array:
    """Adds where the count is not at its end, and the slot is one."""
    nobody = in_output.shape[0]

    def with_room() -> jax.Array:
        full = in_output.at[slot, tokens].get(mode="fill", fill_value=MOST_COPIES) >= MOST_COPIES
        return jnp.where(full, nobody, slot)

    slot = lax.cond(jnp.any(slot < nobody), with_room, lambda: slot)  # where nobody is counted it costs nothing
    return in_output.at[slot, tokens].add(jnp.uint16(1), mode="drop")


def copies(in_output: jax.Array, slot: jax.Array) -> jax.Array:
    """How often each token is in the output of each row, f32[R, V]."""
    return jnp.minimum(in_output[slot], jnp.uint16(MOST_COPIES)).astype(jnp.float32)
