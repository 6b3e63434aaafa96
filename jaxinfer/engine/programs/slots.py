"""What makes slots and cache ready."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.engine.programs.base import Function, Program
from jaxinfer.engine.programs.state import State
from jaxinfer.models.model import Params
from jaxinfer.sampling.slots import Masks, prepare_slot


class Prepare(Program):
    """Makes a slot ready for another sequence, or for other masks."""

    kind = "prepare slot"
    key = (kind, 1)
    changes = ("slots",)
    weights = ()
    result = None

    @property
    def inputs(self) -> tuple[object, ...]:
        masks = Masks.of(self.shapes.model.config.vocab_size, None, [], None)
        return tuple(self.shapes.like((np.int32(0), masks, np.bool_(False))))

    def function(self) -> Function:
        def prepare(
            params: Params, state: State, read: State, slot: jax.Array, masks: Masks, clear: jax.Array
        ) -> tuple[None, State]:
            return None, State(slots=prepare_slot(state.slots, slot, masks, clear))

        return prepare


class Zeros(Program):
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
