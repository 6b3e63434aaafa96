"""What makes slots and cache ready."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.engine.programs.base import EngineShapes, Function, Program
from jaxinfer.engine.programs.state import State
from jaxinfer.models.model import Params
from jaxinfer.sampling.slots import Masks, TokenCounts, prepare_slot


class PrepareMasks(Program[EngineShapes]):
    """Puts a sequence's masks into its slot."""

    kind = "prepare masks"
    key = (kind, 1)
    changes = ("slots",)
    weights = ()
    result = None

    @property
    def values(self) -> Masks | TokenCounts:
        """What the host gives it beside the slot; any."""
        return Masks.of(self.shapes.model.config.vocab_size, None, [], None)

    @property
    def inputs(self) -> tuple[object, ...]:
        return tuple(self.shapes.like((np.int32(0), self.values)))

    def function(self) -> Function:
        def prepare(
            params: Params, state: State, read: State, slot: jax.Array, values: Masks | TokenCounts
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
