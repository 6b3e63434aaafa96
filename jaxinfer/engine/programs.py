"""The programs of an engine, all of them: which there are, for which shapes, and how each is compiled.

Nothing here needs weights, or even devices: a mesh of an abstract topology will do for lowering and compiling.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding

from jaxinfer.attention import Batch
from jaxinfer.cache import CacheLayout
from jaxinfer.engine.buckets import Buckets
from jaxinfer.engine.step import DecodeRows, Rows, Sampled, Scored, State, make_decode, make_step
from jaxinfer.models.model import Model, Params
from jaxinfer.sampling.arrays import SamplingArrays
from jaxinfer.sampling.sample import Logprobs, no_logprobs
from jaxinfer.sampling.slots import Masks, Slots, prepare_slot
from jaxinfer.sharding import ROWS, axis_size, devices_of, replicated

Key = tuple[str, int, int]  # of a program: what it does, tokens, rows


def cache_layout(
    model: Model, place: jax.Device | Mesh, attention: str = "auto", kv_cache_dtype: str = "auto"
) -> CacheLayout:
    """How the model's keys and values are kept there. Raises ValueError if that attention is not to be had."""
    config = model.config
    heads = config.num_layers, config.num_kv_heads, config.head_dim
    return CacheLayout.choose(*heads, model.dtype, place, attention, kv_cache_dtype)


def placed_params(model: Model, place: jax.Device | Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The weights, each with how it is split there."""
    return {name: model.placed(name, place) for name in model.abstract}


def placed_slots(model: Model, place: jax.Device | Mesh, max_rows: int) -> Slots:
    """Slots for `max_rows` sequences on each shard of rows."""
    vocab = model.config.vocab_size
    if not isinstance(place, Mesh):
        return _structs(Slots.shapes(max_rows, vocab), SingleDeviceSharding(place))
    slots = Slots.shapes(axis_size(place, ROWS) * (max_rows + 1) - 1, vocab)
    specs = Slots.specs(vocab, place)
    return Slots(**{name: _structs(getattr(slots, name), NamedSharding(place, spec)) for name, spec in specs.items()})


@dataclass(frozen=True)
class Programs:
    """What is compiled for a model on one device or a mesh, with a cache of `num_pages` pages.

    max_rows: sequences that run at once. max_steps: tokens a row that one decoding call may produce. attention,
    kv_cache_dtype: see LoadOptions. Where the mesh splits rows, `shards` of them, all sizes (buckets' too) are of one
    shard; arrays hold them one after the other.
    """

    model: Model
    place: jax.Device | Mesh
    buckets: Buckets
    num_pages: int
    page_size: int
    max_model_len: int
    max_rows: int
    max_steps: int
    attention: str = "auto"
    kv_cache_dtype: str = "auto"

    @property
    def mesh(self) -> Mesh | None:
        return self.place if isinstance(self.place, Mesh) else None

    @property
    def layout(self) -> CacheLayout:
        """Of the cache."""
        return cache_layout(self.model, self.place, self.attention, self.kv_cache_dtype)

    @property
    def devices(self) -> list[jax.Device]:
        """Those of the mesh, in its order."""
        return devices_of(self.place)

    @property
    def shards(self) -> int:
        """Of rows; each has its own slots and pages."""
        return axis_size(self.mesh, ROWS)

    @property
    def table_width(self) -> int:
        """Pages of the longest sequence."""
        return -(-self.max_model_len // self.page_size)

    @cached_property
    def whole(self) -> Sharding:
        """Of what every device has the same of."""
        return replicated(self.place) if isinstance(self.place, Mesh) else SingleDeviceSharding(self.place)

    @cached_property
    def params(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The weights."""
        return placed_params(self.model, self.place)

    @cached_property
    def state(self) -> State:
        """Cache and slots."""
        layout = self.layout
        cache = layout.shapes(self.shards * self.num_pages, self.page_size)
        held = self.whole if self.mesh is None else NamedSharding(self.mesh, layout.spec)
        return State(_structs(cache, held), placed_slots(self.model, self.place, self.max_rows))

    @cached_property
    def table(self) -> dict[Key, Program]:
        """All that an engine can need."""
        decode = [Decode(self, rows) for rows in self.buckets.decode]
        step = [Step(self, tokens, rows) for rows in self.buckets.mixed_rows for tokens in self.buckets.tokens]
        return {program.key: program for program in (*decode, *step, Prepare(self), Zeros(self))}

    def keys(self) -> list[Key]:
        """Of all of them."""
        return list(self.table)

    def __getitem__(self, key: Key) -> Program:
        return self.table[key]

    def jit(self, kind: type[Program]) -> Any:
        """The function of all programs of a kind."""
        if kind not in self._jits:
            self._jits[kind] = kind.jit(self)
        return self._jits[kind]

    @cached_property
    def _jits(self) -> dict[type[Program], Any]:
        return {}

    def pinned(self, results: Any) -> dict[str, Any]:
        """What `jax.jit` is told of a program's results on a mesh, or XLA may choose other shardings, and donation is
        silently lost."""
        return {} if self.mesh is None else {"out_shardings": results}

    @property
    def shardings(self) -> State:
        """Of cache and slots."""
        return jax.tree.map(lambda s: s.sharding, self.state)

    def like(self, tree: Any) -> Any:
        """Arguments that the host gives, abstractly."""
        return _structs(tree, self.whole)

    def ints(self, first: int, *shape: int) -> Any:
        """An array of integers, `first` of each shard of rows, abstractly."""
        return jax.ShapeDtypeStruct((self.shards * first, *shape), np.int32, sharding=self.whole)


class Program(ABC):
    """A function that runs on the devices, for batches of one size.

    key: of the program, in manifests and between hosts.
    """

    def __init__(self, programs: Programs, key: Key):
        self.programs, self.key = programs, key

    @property
    def held(self) -> tuple[Any, ...]:
        """Its first arguments, abstractly: those that stay on the devices."""
        return self.programs.params, self.programs.state

    @property
    @abstractmethod
    def given(self) -> tuple[Any, ...]:
        """The others, abstractly: those that the host gives it."""

    @property
    def arguments(self) -> tuple[Any, ...]:
        return *self.held, *self.given

    @property
    @abstractmethod
    def results(self) -> Any:
        """The structure of what it gives, with anything for leaves."""

    @staticmethod
    @abstractmethod
    def jit(programs: Programs) -> Any:
        """The function, jitted; what calls carry is donated."""

    def run(self, executable: Any, params: Params, state: State, given: tuple[Any, ...]) -> tuple[Any, State]:
        """Calls it, compiled: what it gives to the host, and the state after it."""
        result: tuple[Any, State] = executable(params, state, *given)
        return result

    def lower(self) -> jax.stages.Lowered:
        """The program before it is compiled."""
        place: jax.Device | Mesh = self.programs.place
        on_tpu = self.programs.devices[0].platform == "tpu"
        if not isinstance(place, Mesh) and on_tpu:
            place = Mesh(np.array(self.programs.devices), ("all",))
        with contextlib.ExitStack() as stack:
            if isinstance(place, Mesh):  # kernels ask what kind of device they are for
                stack.enter_context(jax.sharding.use_abstract_mesh(place.abstract_mesh))
            # JAX has a GPU's from the device, where "gpu" is a family that it knows only if one of it is there.
            traced = self.programs.jit(type(self)).trace(*self.arguments)
            return traced.lower(lowering_platforms=("tpu",) if on_tpu else None)


class Decode(Program):
    """Some tokens of each of `rows` sequences."""

    kind = "decode"

    def __init__(self, programs: Programs, rows: int):
        super().__init__(programs, (self.kind, rows, rows))
        self.rows = rows

    @property
    def given(self) -> tuple[Any, ...]:
        ints, like = self.programs.ints, self.programs.like
        row, pages = ints(self.rows), ints(self.rows, self.programs.table_width)
        return DecodeRows(row, row, row, pages), like(_sampling(self.programs, self.rows)), like(np.int32(0))

    @property
    def results(self) -> Any:
        info = _logprobs(self.programs)
        return Sampled(info.rank, info.rank, info), self.programs.state

    @staticmethod
    def jit(programs: Programs) -> Any:
        return _jit(programs, make_decode(programs.model, programs.max_steps, programs.place))


class Step(Program):
    """A mixed call: `tokens` of prompts and of decoding sequences, of `rows` sequences."""

    kind = "step"

    def __init__(self, programs: Programs, tokens: int, rows: int):
        super().__init__(programs, (self.kind, tokens, rows))
        self.tokens, self.rows = tokens, rows

    @property
    def given(self) -> tuple[Any, ...]:
        ints, like = self.programs.ints, self.programs.like
        token, row, pages = ints(self.tokens), ints(self.rows), ints(self.rows, self.programs.table_width)
        batch = Batch(token, token, token, ints(self.rows + 1), row, pages, ints(3), row)
        scored = Scored(token, token, ints(1), like(np.zeros(self.programs.shards, bool)))
        return batch, Rows(row, row), like(_sampling(self.programs, self.rows)), scored

    @property
    def results(self) -> Any:
        info = _logprobs(self.programs)
        return Sampled(info.rank, info.rank, info, info), self.programs.state

    @staticmethod
    def jit(programs: Programs) -> Any:
        return _jit(programs, make_step(programs.model, programs.place))


class Prepare(Program):
    """Makes a slot ready for another sequence, or for other masks."""

    key: Key = ("prepare slot", 1, 1)

    def __init__(self, programs: Programs):
        super().__init__(programs, Prepare.key)

    @property
    def held(self) -> tuple[Any, ...]:
        return (self.programs.state.slots,)

    @property
    def given(self) -> tuple[Any, ...]:
        masks = Masks.of(self.programs.model.config.vocab_size, None, [], None)
        return tuple(self.programs.like((np.int32(0), masks, np.bool_(False))))

    @property
    def results(self) -> Any:
        return self.programs.state.slots

    @staticmethod
    def jit(programs: Programs) -> Any:
        return jax.jit(prepare_slot, donate_argnums=0, **programs.pinned(programs.shardings.slots))

    def run(self, executable: Any, params: Params, state: State, given: tuple[Any, ...]) -> tuple[None, State]:
        return None, State(state.cache, executable(state.slots, *given))


class Zeros(Program):
    """A new cache, and new slots: one zero-filled pool, no temporaries."""

    key: Key = ("zeros", 1, 1)
    held = given = ()

    def __init__(self, programs: Programs):
        super().__init__(programs, Zeros.key)

    @property
    def results(self) -> Any:
        return self.programs.state

    @staticmethod
    def jit(programs: Programs) -> Any:
        def zeros() -> State:
            return jax.tree.map(lambda s: jax.numpy.zeros(s.shape, s.dtype), programs.state)

        return jax.jit(zeros, out_shardings=programs.shardings)

    def run(self, executable: Any, params: Params, state: State | None, given: tuple[Any, ...]) -> tuple[None, State]:
        return None, executable()


def _jit(programs: Programs, call: Any) -> Any:
    """Of what takes parameters and state, and gives results and the state after it."""
    return jax.jit(call, donate_argnums=1, **programs.pinned((programs.whole, programs.shardings)))


def _sampling(programs: Programs, rows: int) -> SamplingArrays:
    return SamplingArrays.of_rows([], programs.shards * rows)


def _logprobs(programs: Programs) -> Logprobs:
    return jax.eval_shape(lambda: no_logprobs(1, programs.model.config.vocab_size))


def _structs(tree: Any, sharding: Sharding) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
