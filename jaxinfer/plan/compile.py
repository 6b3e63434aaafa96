"""The engine's largest programs, compiled for a slice: what they need of each chip's memory."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from jaxinfer.compile_cache import without_compile_cache
from jaxinfer.engine.background import in_background
from jaxinfer.engine.programs import Key, ModelPrograms
from jaxinfer.engine.sizing import device_bytes
from jaxinfer.plan.collectives import Collectives, collectives
from jaxinfer.plan.fit import DoesNotFit, Fit
from jaxinfer.plan.slices import GIB


@dataclass(frozen=True)
class Program:
    """A compiled program. Bytes are each chip's.

    key: which of the engine's.
    arguments: bytes of all that it is given, as the compiler lays it out.
    padding: what that adds to their shapes.
    temporaries, code: bytes of them.
    collectives: by kind.
    seconds: that compiling took.
    """

    key: Key
    arguments: int
    padding: int
    temporaries: int
    code: int
    collectives: Mapping[str, Collectives]
    seconds: float

    def figures(self) -> dict[str, Any]:
        """As numbers by name."""
        return {
            "program": f"{self.key[0]}, {self.key[1]} tokens",
            "arguments": self.arguments,
            "temporaries": self.temporaries,
            "code": self.code,
            "collectives": {kind: dataclasses.asdict(total) for kind, total in self.collectives.items()},
            "compile_seconds": self.seconds,
        }


@dataclass(frozen=True)
class Plan:
    """A model on a slice, compiled. Bytes are each chip's.

    fit: what is held.
    programs: none where there is no compiler for the slice.
    """

    fit: Fit
    programs: tuple[Program, ...]

    @property
    def padding(self) -> int:
        """What the compiler adds to the shapes of what is held."""
        return max((program.padding for program in self.programs), default=0)

    @property
    def temporaries(self) -> int:
        return max((program.temporaries for program in self.programs), default=0)

    @property
    def code(self) -> int:
        """Of the compiled programs; a warmed-up engine has more of them."""
        return sum(program.code for program in self.programs)

    @property
    def total(self) -> int:
        return self.fit.held + self.padding + self.temporaries + self.code

    @property
    def free(self) -> int:
        return self.fit.target.chip.memory - self.total


def make_plan(held: Fit) -> Plan:
    """Compiles what an LLM would run that holds this. Raises DoesNotFit, with what would fit."""
    if not held.target.compiles:
        return Plan(held, ())
    keys = held.programs.largest
    make = functools.partial(compiled_program, held.programs)
    with refusals(held), without_compile_cache(), in_background(make, keys, len(keys)) as futures:
        compiled = tuple(future.result() for future in futures)
    plan = Plan(held, compiled)
    if plan.free < 0:
        raise _too_much(held, f"{plan.total / GIB:.2f} GiB")
    return plan


@contextlib.contextmanager
def refusals(held: Fit) -> Iterator[None]:
    """Says what it means where the compiler refuses a program: DoesNotFit."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sizes = re.findall(r"\b([\d.]+)G\b", str(error))  # the compiler's words for GiB: needed, there
        raise _too_much(held, f"{sizes[0]} GiB" if sizes else "more memory") from None


def _too_much(held: Fit, needed: str) -> DoesNotFit:
    there, taken = (f"{size / GIB:.2f}" for size in (held.target.chip.memory, held.held))
    return DoesNotFit(
        f"{held.target.name}: programs need {needed}; a chip has {there}, and weights and cache take {taken}: lower "
        "memory_utilization, max_num_seqs or max_num_batched_tokens, or take more chips"
    )


def compiled_program(programs: ModelPrograms, key: Key) -> Program:
    """One of them, compiled, and what it needs."""
    start = time.perf_counter()
    compiled = programs[key].lower().compile()
    seconds = time.perf_counter() - start
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None
    assert text is not None
    return Program(
        key,
        memory.argument_size_in_bytes,
        memory.argument_size_in_bytes - device_bytes(programs[key].arguments),
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
        collectives(text),
        seconds,
    )
