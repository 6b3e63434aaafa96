"""The programs of an engine, all of them: which there are, for which shapes, and how each is compiled.

Nothing here needs weights, or even devices: a mesh of an abstract topology will do for lowering and compiling.
"""

from __future__ import annotations

import contextlib
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
from jaxinfer.models.model import Model
from jaxinfer.sampling.arrays import SamplingArrays
from jaxinfer.sampling.sample import no_logprobs
from jaxinfer.sampling.slots import Masks, Slots, prepare_slot
from jaxinfer.sharding import ROWS, axis_size, devices_of, replicated

Key = tuple[str, int, int]  # of a program: what it does, tokens, rows
PREPARE: Key = ("prepare slot", 1, 1)
ZEROS: Key = ("zeros", 1, 1)  # a new cache, and new slots: one zero-filled pool, no temporaries


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

    def keys(self) -> list[Key]:
        """All programs that an engine can need."""
        steps = [("step", length, rows) for rows in self.buckets.mixed_rows for length in self.buckets.tokens]
        return [*(("decode", rows, rows) for rows in self.buckets.decode), *steps, PREPARE, ZEROS]

    def arguments(self, key: Key) -> tuple[Any, ...]:
        """A program's arguments, abstractly."""
        kind, length, rows = key
        if key == ZEROS:
            return ()
        if key == PREPARE:
            masks = Masks.of(self.model.config.vocab_size, None, [], None)
            return (self.state.slots, *self._structs((np.int32(0), masks, np.bool_(False))))
        sampling = self._structs(SamplingArrays.of_rows([], self.shards * rows))
        row, pages = self._ints(rows), self._ints(rows, self.table_width)
        if kind == "decode":
            return self.params, self.state, DecodeRows(row, row, row, pages), sampling, self._structs(np.int32(0))
        token = self._ints(length)
        batch = Batch(token, token, token, self._ints(rows + 1), row, pages, self._ints(3), row)
        scored = Scored(token, token, self._ints(1), self._structs(np.zeros(self.shards, bool)))
        return self.params, self.state, batch, Rows(row, row), sampling, scored

    def results(self, key: Key) -> Any:
        """The structure of what a program gives, with anything for leaves."""
        if key == ZEROS:
            return self.state
        if key == PREPARE:
            return self.state.slots
        info = jax.eval_shape(lambda: no_logprobs(1, self.model.config.vocab_size))
        return Sampled(info.rank, info.rank, info, info if key[0] == "step" else None), self.state

    def lower(self, key: Key) -> jax.stages.Lowered:
        """The program before it is compiled; cache and slots are donated."""
        arguments = self.arguments(key)
        place = self.place
        on_tpu = self.devices[0].platform == "tpu"
        if self.mesh is None and on_tpu:
            place = Mesh(np.array(self.devices), ("all",))
        with contextlib.ExitStack() as stack:
            if isinstance(place, Mesh):  # kernels ask what kind of device they are for
                stack.enter_context(jax.sharding.use_abstract_mesh(place.abstract_mesh))
            # JAX has a GPU's from the device, where "gpu" is a family that it knows only if one of it is there.
            return self._jits[key[0]].trace(*arguments).lower(lowering_platforms=("tpu",) if on_tpu else None)

    @cached_property
    def _jits(self) -> dict[str, Any]:
        # Without pinned shardings of its results XLA may choose others, and donation is silently lost.
        pinned: dict[str, Any] = {} if self.mesh is None else {"out_shardings": (self.whole, self._shardings)}
        slots: dict[str, Any] = {} if self.mesh is None else {"out_shardings": self._shardings.slots}
        return {
            "step": jax.jit(make_step(self.model, self.place), donate_argnums=1, **pinned),
            "decode": jax.jit(make_decode(self.model, self.max_steps, self.place), donate_argnums=1, **pinned),
            "prepare slot": jax.jit(prepare_slot, donate_argnums=0, **slots),
            "zeros": jax.jit(self._zeros, out_shardings=self._shardings),
        }

    def _zeros(self) -> State:
        return jax.tree.map(lambda s: jax.numpy.zeros(s.shape, s.dtype), self.state)

    @property
    def _shardings(self) -> State:
        return jax.tree.map(lambda s: s.sharding, self.state)

    def _structs(self, tree: Any) -> Any:
        return _structs(tree, self.whole)

    def _ints(self, first: int, *shape: int) -> Any:
        return jax.ShapeDtypeStruct((self.shards * first, *shape), np.int32, sharding=self.whole)


def _structs(tree: Any, sharding: Sharding) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
