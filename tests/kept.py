"""Programs that were compiled in this process are kept for its other tests: tracing and lowering the same ones again
takes a third of the tests' time. What else than the model and shapes changes a program must be in `identity`."""

from __future__ import annotations

import os
import threading
from collections.abc import Hashable
from typing import Any

import jax

from jaxinfer.engine import load
from jaxinfer.engine.programs import Program

MOST = 64  # each has a hundred pieces of memory of its own, and Linux has no more than 65,530 for a process

_lower = Program.lower
_kept: dict[Hashable, Any] = {}  # the last used at the end
_turn = threading.Lock()  # programs are compiled by several threads


class Lowered:
    """As `Program.lower` gives it, when it is asked for anything but to be compiled."""

    def __init__(self, program: Program):
        self._program = program

    def __getattr__(self, name: str) -> Any:
        return getattr(_lower(self._program), name)

    def compile(self) -> Any:
        which = identity(self._program)
        with _turn:
            kept = _kept.pop(which, None)
        if kept is None:
            kept = _lower(self._program).compile()
        with _turn:
            _kept[which] = kept
            if len(_kept) > MOST:
                del _kept[next(iter(_kept))]
        return kept


def identity(program: Program) -> Hashable:
    programs, model = program.shapes, program.shapes.model
    leaves, tree = jax.tree.flatten((program.arguments, programs.state))
    arrays = tuple((leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves)
    held = (
        model._module()[0],
        model.declared.described,
        model.dtype,
        model.weight_dtype,
        tuple(sorted(model.quantized.items(), key=str)),
    )
    options = programs.placement, str(programs.facts)
    environment = tuple(sorted(item for item in os.environ.items() if item[0].startswith(("JAX_", "JAXINFER_"))))
    cached = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    # What comes out of the cache can't be written again: what is to be must not be that.
    return program.key, tree, arrays, held, options, environment, cached


def keep() -> None:
    """From now on; and what tests in this process compile is not what an earlier process has."""
    load.open_executables = lambda *_: None
    Program.lower = lambda program: Lowered(program)  # type: ignore[method-assign, assignment, return-value]
