"""What makes slots, cache and adapters ready."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer.engine.programs.base import EngineShapes, Function, Program
from jaxinfer.engine.programs.state import State
from jaxinfer.models.model import Params
from jaxinfer.sampling.slots import Masks, TablePlaces, TokenCounts, prepare_slot
from jaxinfer.sampling.tables import TokenTables
from jaxinfer.weights import LowRank


class PrepareMasks(Program[EngineShapes]):
    """Puts a sequence's masks into its slot."""

    kind = "prepare masks"
    key = (kind, 1)
    changes = ("slots",)
    weights = ()
    result = None

    @property
    def values(self) -> Masks | TokenCounts | TablePlaces:
        """What the host gives it beside the slot; any."""
        return Masks.of(self.shapes.model.config.vocab_size, None, [], None)

    @property
    def inputs(self) -> tuple[object, ...]:
        return tuple(self.shapes.like((np.int32(0), self.values)))

    def function(self) -> Function:
        def prepare(
            params: Params, state: State, read: State, slot: jax.Array, values: Masks | TokenCounts | TablePlaces
        ) -> tuple[None, State]:
            return None, State(slots=prepare_slot(state.slots, slot, values))

        return prepare


class PrepareCounts(PrepareMasks):
    """Puts into its slot which tokens a sequence with penalties has."""

    kind = "prepare counts"
    key = (kind, 1)

    @property
    def values(self) -> TokenCounts:
        return TokenCounts.of(self.shapes.model.config.vocab_size, [], [])


class PreparePlaces(PrepareMasks):
    """Puts into slots where in their grammars' tables sequences are; those beyond them have nobody's slot."""

    kind = "prepare places"
    key = (kind, 1)

    @property
    def values(self) -> TablePlaces:
        return TablePlaces(np.zeros(self.shapes.shards * self.shapes.max_rows, np.int32))

    @property
    def inputs(self) -> tuple[object, ...]:
        return self.shapes.ints(self.shapes.max_rows), self.shapes.like(self.values)


class LoadTable(Program[EngineShapes]):
    """Puts some states of a grammar's table into their block, of those of all shards."""

    kind = "load table"
    key = (kind, 1)
    changes = ("slots",)
    weights = ()
    result = None

    @property
    def inputs(self) -> tuple[object, ...]:
        return tuple(self.shapes.like((np.int32(0), TokenTables.shapes(self.shapes.model.config.vocab_size))))

    def function(self) -> Function:
        def load(params: Params, state: State, read: State, block: jax.Array, value: TokenTables) -> tuple[None, State]:
            slots = state.slots
            return None, State(slots=dataclasses.replace(slots, tables=slots.tables.put(block, value)))

        return load


class Zeros(Program[EngineShapes]):
    """A new state: one zero-filled pool, no temporaries."""

    kind = "zeros"
    key = (kind, 1)
    weights = ()
    inputs = ()
    result = None

    @property
    def results(self) -> tuple[object, State]:
        return None, self.shapes.state

    def function(self) -> Function:
        def zeros(*_: object) -> tuple[None, State]:
            return None, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self.shapes.state)

        return zeros


class LoadAdapter(Program[EngineShapes]):
    """Puts an adapter into its slot."""

    kind = "load adapter"
    key = (kind, 1)
    changes = ("adapters",)
    weights = ()
    result = None

    @property
    def inputs(self) -> tuple[object, ...]:
        return self.shapes.like((np.int32(0), dict(self.shapes.adapter)))

    def function(self) -> Function:
        def load(
            params: Params, state: State, read: State, slot: jax.Array, adapter: Mapping[str, LowRank]
        ) -> tuple[None, State]:
            adapter = {name: self.scaled(params, name, own) for name, own in adapter.items()}

            def put(name: str) -> LowRank:
                axis = len(self.shapes.model.adaptable[name].shape) - 2  # behind that of experts
                put = functools.partial(lax.dynamic_update_index_in_dim, index=slot, axis=axis)
                own: LowRank = jax.tree.map(put, state.adapters[name], adapter[name])
                return own

            return None, State(adapters={name: put(name) for name in state.adapters})

        return load

    def scaled(self, params: Params, name: str, own: LowRank) -> LowRank:
        """With the factors that rows are multiplied with in `gain`."""
        return own


class LoadScaledAdapter(LoadAdapter):
    """The same of one whose rows have lengths (DoRA): those are in `gain`, NaN where a weight has none, and become
    factors. Lengths of rows are those of the weights as they are kept here, dequantized."""

    kind = "load scaled adapter"
    key = (kind, 1)

    @property
    def weights(self) -> Collection[str]:  # type: ignore[override]
        model, changed = self.shapes.model, {self.shapes.model.adaptable[name].name for name in self.shapes.adapter}
        return [name for name, (spec, _) in model.arrays.items() if spec.name in changed]

    def scaled(self, params: Params, name: str, own: LowRank) -> LowRank:
        if own.gain is None:
            return own
        model = self.shapes.model
        weight: Any = model.adaptable[name].bind(params, False)
        whole = weight.take(jnp.arange(weight.shape[0]), jnp.float32)
        a, b, is_table = own.a.astype(jnp.float32), own.b.astype(jnp.float32), name == model.vocabulary[0]
        low = (a, b) if is_table else (b.T, a)
        whole = whole + jnp.matmul(*low, precision=lax.Precision.HIGHEST)
        lengths = jnp.linalg.norm(whole, axis=0 if is_table else 1)  # 0 of rows that a mesh has added
        gain = jnp.where(jnp.isnan(own.gain) | (lengths == 0), 1, own.gain / lengths)
        return dataclasses.replace(own, gain=gain)
