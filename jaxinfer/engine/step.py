"""What runs on the device: pure functions of parameters, cache, slots, batch and sampling arrays.

Defined once and lowered by all who need them, with real or abstract arrays. A sequence's last token stays on the
device, in its slot, so that the next call can be sent off before the host has seen the tokens of this one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxinfer.attention import Batch
from jaxinfer.cache import Cache
from jaxinfer.models.causal import CausalLM
from jaxinfer.models.model import Model, Params
from jaxinfer.sampling.arrays import SamplingArrays
from jaxinfer.sampling.sample import Logprobs, draw, in_blocks, no_logprobs, stops, token_logprobs
from jaxinfer.sampling.slots import Slots, count
from jaxinfer.sharding import FSDP, ROWS, TENSOR, axis_size, devices_of, on_axes

SCORE_BLOCK = 128  # tokens: their logits are 65 MB for a vocabulary of 128,000


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What calls carry from one to the next, donated each time: the cache and the slots."""

    cache: Cache
    slots: Slots


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """The rows of a mixed call. slot i32[R]; samples i32[R]: 1, or 0 where a chunk does not end its prompt."""

    slot: jax.Array | np.ndarray
    samples: jax.Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scored:
    """Given tokens whose log-probabilities are wanted: the first `count`, i32[1], of tokens i32[T]. after i32[T]: where
    in the stream the token before each one is. likeliest bool[1]: the likeliest tokens are wanted too."""

    tokens: jax.Array | np.ndarray
    after: jax.Array | np.ndarray
    count: jax.Array | np.ndarray
    likeliest: jax.Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeRows:
    """The rows of a decoding call. slot i32[R]; samples i32[R]: most tokens to sample, 0 for an unused row;
    positions i32[R], of the token that is fed first; pages i32[R, P]."""

    slot: jax.Array | np.ndarray
    samples: jax.Array | np.ndarray
    positions: jax.Array | np.ndarray
    pages: jax.Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampled:
    """tokens i32[S, R], as `sample` has them; count i32[R], how many of the S are real; logprobs with the same leading
    axes. scored: Logprobs [T] of the tokens in `Scored`, of a mixed call."""

    tokens: jax.Array
    count: jax.Array
    logprobs: Logprobs
    scored: Logprobs | None = None


Step = Callable[[Params, State, Batch, Rows, SamplingArrays, Scored], tuple[Sampled, State]]
LogitsOf = Callable[[jax.Array], jax.Array]
Decode = Callable[[Params, State, DecodeRows, SamplingArrays, Any], tuple[Sampled, State]]


def make_step(model: Model, place: jax.Device | Mesh | None = None) -> Step:
    """One mixed call: decoding rows, one token each (taken from their slots), then chunks of prompts.

    On a mesh every array of rows, tokens, slots or pages is several shards' one after the other, with indices that
    count from the shard's own beginning.
    """
    mesh, kind = _mesh_and_kind(place)
    parts = _parts_of_logits(model, mesh)

    def step(
        params: Params, state: State, batch: Batch, rows: Rows, sampling: SamplingArrays, scored: Scored
    ) -> tuple[Sampled, State]:
        module = model.bind(params)
        logits_of = _logits_of(module, model, mesh)
        slots, slot = state.slots, jnp.asarray(rows.slot)
        size = slot.shape[0]
        token_slot = slot[batch.row]
        batch = dataclasses.replace(batch, mesh=mesh, device_kind=kind)
        decoding = jnp.arange(batch.tokens.shape[0], dtype=jnp.int32) < batch.rows[0]
        batch = dataclasses.replace(batch, tokens=jnp.where(decoding, slots.token[token_slot], batch.tokens))
        # A decoding row that has stopped in a call whose tokens the host has not seen yet: it must write nothing.
        index = jnp.arange(size, dtype=jnp.int32)
        dead = (index < batch.rows[0]) & ~slots.alive[slot]
        batch = dataclasses.replace(batch, kv_len=jnp.where(dead, 0, batch.kv_len))
        stream, cache = module.hidden(batch, state.cache)
        assert cache is not None
        slots = _count_prompt(slots, batch, token_slot, decoding, sampling)
        length = batch.positions[batch.logits_at] + 1
        count = jnp.where(dead, 0, jnp.minimum(jnp.asarray(rows.samples), 1))

        def chosen() -> tuple[jax.Array, Logprobs]:
            return draw(logits_of(stream[batch.logits_at]), sampling, length, slots, slot, parts)

        # Inner chunks and scored texts sample nothing.
        nothing = jnp.zeros(size, jnp.int32), no_logprobs(size, model.config.vocab_size)
        tokens, info = lax.cond(_anywhere(jnp.any(count > 0), mesh), chosen, lambda: nothing)
        slots = _take(slots, slot, tokens, count > 0, sampling, length)
        info = jax.tree.map(lambda x: x[None], info)
        found = _score(logits_of, stream, scored, model.config.vocab_size, mesh)
        return Sampled(tokens[None], count, info, found), State(cache, slots)

    return _over_rows(step, model, mesh, (PartitionSpec(ROWS),) * 4, PartitionSpec(ROWS))


def make_decode(model: Model, max_steps: int, place: jax.Device | Mesh | None = None) -> Decode:
    """Up to `max_steps` tokens a row in one call; `steps`, i32[], says how many this time.

    A row ends at one of its stop ids or after `rows.samples` tokens; the call ends when all rows have.
    """
    mesh, kind = _mesh_and_kind(place)
    parts = _parts_of_logits(model, mesh)

    def decode(
        params: Params, state: State, rows: DecodeRows, sampling: SamplingArrays, steps: jax.Array
    ) -> tuple[Sampled, State]:
        module = model.bind(params)
        logits_of = _logits_of(module, model, mesh)
        slot = jnp.asarray(rows.slot)
        size = slot.shape[0]
        index = jnp.arange(size, dtype=jnp.int32)

        def advance(i: jax.Array, active: jax.Array, state: State) -> tuple[jax.Array, Logprobs, State]:
            positions = jnp.asarray(rows.positions) + i
            batch = Batch(
                tokens=state.slots.token[slot],
                positions=positions,
                row=index,
                q_start=jnp.arange(size + 1, dtype=jnp.int32),
                kv_len=jnp.where(active, positions + 1, 0),
                pages=jnp.asarray(rows.pages),
                rows=jnp.full(3, size, jnp.int32),
                logits_at=index,
                decode_only=True,
                mesh=mesh,
                device_kind=kind,
            )
            stream, cache = module.hidden(batch, state.cache)
            assert cache is not None
            tokens, info = draw(logits_of(stream), sampling, positions + 1, state.slots, slot, parts)
            slots = _take(state.slots, slot, tokens, active, sampling, positions + 1)
            return tokens, info, State(cache, slots)

        active = (jnp.asarray(rows.samples) > 0) & state.slots.alive[slot]
        tokens, info, _ = jax.eval_shape(functools.partial(advance, jnp.int32(0)), active, state)
        out = jax.tree.map(lambda s: jnp.zeros((max_steps, *s.shape), s.dtype), (tokens, info))

        def going(carry: Any) -> jax.Array:
            i, active, *_ = carry
            return (i < steps) & _anywhere(jnp.any(active), mesh)

        def body(carry: Any) -> Any:
            i, active, count, state, out = carry
            tokens, info, state = advance(i, active, state)
            out = jax.tree.map(lambda all_, one: lax.dynamic_update_index_in_dim(all_, one, i, 0), out, (tokens, info))
            count = count + active.astype(jnp.int32)
            active = active & state.slots.alive[slot] & (i + 1 < rows.samples)
            return i + 1, active, count, state, out

        start = (jnp.int32(0), active, jnp.zeros(size, jnp.int32), state, out)
        _, _, count, state, (all_tokens, all_info) = lax.while_loop(going, body, start)
        return Sampled(all_tokens, count, all_info), state

    specs = (PartitionSpec(ROWS), PartitionSpec(ROWS), PartitionSpec())
    return _over_rows(decode, model, mesh, specs, None)


def _mesh_and_kind(place: jax.Device | Mesh | None) -> tuple[Mesh | None, str]:
    kind = "" if place is None else devices_of(place)[0].device_kind
    return place if isinstance(place, Mesh) else None, kind


def _parts_of_logits(model: Model, mesh: Mesh | None) -> int:
    """Over how many devices they are split, where the vocabulary can be: see `_logits_of`."""
    parts = axis_size(mesh, TENSOR)
    return 1 if model.config.vocab_size % parts else parts


def _over_rows(call: Any, model: Model, mesh: Mesh | None, specs: tuple[Any, ...], scored: Any) -> Any:
    """A call that is written for one shard of rows, for all of them: each runs its own. What tensor devices do within a
    shard is left to XLA. specs: of the arguments after parameters and state."""
    if mesh is None:
        return call
    params = {name: on_axes(axes, ROWS) for name, axes in model.axes.items()}
    state, by_step = PartitionSpec(ROWS), PartitionSpec(None, ROWS)
    sampled = Sampled(by_step, PartitionSpec(ROWS), by_step, scored)  # type: ignore[arg-type]
    return jax.shard_map(
        call,
        mesh=mesh,
        axis_names=set(ROWS),
        in_specs=(params, state, *specs),
        out_specs=(sampled, state),
        check_vma=False,
    )


def _anywhere(condition: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Whether it is so on any shard of rows: what has collectives in it must be run by all or by none."""
    return _most(condition.astype(jnp.int32), mesh) > 0


def _most(count: jax.Array, mesh: Mesh | None) -> jax.Array:
    """The largest that it is on any shard of rows."""
    return count if axis_size(mesh, ROWS) == 1 else lax.pmax(count, ROWS)


def _logits_of(module: CausalLM, model: Model, mesh: Mesh | None) -> LogitsOf:
    """Logits of the vocabulary, and no more of it. Each tensor device has its part of them, and sampling is done in
    parts; all have all of them where the vocabulary had to be padded."""
    vocab = model.config.vocab_size

    def logits_of(x: jax.Array) -> jax.Array:
        logits = module.logits(x, mesh)
        if mesh is not None:  # also where they are put together next, or XLA would gather the head's weights
            logits = lax.with_sharding_constraint(logits, PartitionSpec(None, TENSOR))
            if logits.shape[1] != vocab:
                logits = lax.with_sharding_constraint(logits, PartitionSpec())
        return logits[:, :vocab]

    return logits_of


def _score(logits_of: LogitsOf, stream: jax.Array, scored: Scored, vocab: int, mesh: Mesh | None) -> Logprobs:
    """Log-probabilities of given tokens. A block of them at a time, as many blocks as are wanted: there are never more
    logits than those of a block, and where nobody asks this costs nothing."""
    after, tokens = jnp.asarray(scored.after), jnp.asarray(scored.tokens)
    size = tokens.shape[0]
    block = min(max(SCORE_BLOCK // axis_size(mesh, (FSDP,)), 1), size)  # `head_logits` has those of all shards

    def some(after: jax.Array, tokens: jax.Array) -> Logprobs:
        return token_logprobs(logits_of(stream[after]), tokens, jnp.asarray(scored.likeliest)[0])

    blocks = _most((jnp.asarray(scored.count)[0] + (block - 1)) // block, mesh)
    found: Logprobs = in_blocks(some, (after, tokens), no_logprobs(size, vocab), block, blocks)
    return found


def _count_prompt(
    slots: Slots, batch: Batch, token_slot: jax.Array, decoding: jax.Array, sampling: SamplingArrays
) -> Slots:
    """Notes the chunk's tokens of rows with penalties (those after the prompt are output, computed once more)."""
    nobody = slots.token.shape[0]
    live = jnp.arange(batch.tokens.shape[0], dtype=jnp.int32) < batch.q_start[-1]
    counted = jnp.asarray(sampling.penalized)[batch.row] & ~decoding & live
    of_prompt = batch.positions < jnp.asarray(sampling.prompt_length)[batch.row]
    seen = slots.in_prompt.at[jnp.where(counted & of_prompt, token_slot, nobody), batch.tokens].set(True, mode="drop")
    output = count(slots.in_output, token_slot, batch.tokens, counted & ~of_prompt)
    return dataclasses.replace(slots, in_prompt=seen, in_output=output)


def _take(
    slots: Slots, slot: jax.Array, tokens: jax.Array, taken: jax.Array, sampling: SamplingArrays, length: jax.Array
) -> Slots:
    """The slots after rows of `length` tokens have sampled `tokens`, where `taken`."""
    nobody = slots.token.shape[0]
    at = jnp.where(taken, slot, nobody)
    alive = ~stops(tokens, sampling, length)
    tokens = jnp.maximum(tokens, 0)  # there may be none
    return dataclasses.replace(
        slots,
        token=slots.token.at[at].set(tokens, mode="drop"),
        alive=slots.alive.at[at].set(alive, mode="drop"),
        in_output=count(slots.in_output, slot, tokens, taken & jnp.asarray(sampling.penalized)),
    )
