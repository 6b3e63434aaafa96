"""What a program is, and what all of an engine's have in common: model, place, sizes.

Nothing here needs weights, or even devices: a mesh of an abstract topology will do for lowering and compiling.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, cast

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxinfer.attention import CacheLayout, LayerLayout, LayerMap, Table
from jaxinfer.engine.buckets import Buckets
from jaxinfer.engine.programs.adapters import NO_ADAPTERS, AdapterLimits, adapter_axes, one_adapter, placed_adapters
from jaxinfer.engine.programs.state import State
from jaxinfer.models.model import AbstractModel, Params
from jaxinfer.sampling.slots import DecodeState
from jaxinfer.sharding import ROWS, axis_size, describe, devices_of, on_axes, replicated
from jaxinfer.weights import Axes, LowRank

if TYPE_CHECKING:
    from jaxinfer.models.causal import CausalLM

T = TypeVar("T")
Key = tuple[str, int]  # of a program: what it does, and for how many tokens or rows
MAX_STEPS = 32  # tokens a row that one decoding call may produce
# Scatters and sorts of some sizes are for a part of v6e whose compiler overflows its stack (libtpu 0.0.42).
TPU_OPTIONS: dict[str, bool | str] = {"xla_tpu_enable_offloading_scatter_to_sparsecore": "false"}


def reach(max_tokens: int, max_steps: int = MAX_STEPS) -> int:
    """Most tokens of one sequence that a call writes. max_tokens: of a mixed call; max_steps: of a decoding one."""
    return max(max_tokens, max_steps)


def cache_layout(
    model: AbstractModel, placement: jax.Device | Mesh, attention: str = "auto", kv_cache_dtype: str = "auto"
) -> CacheLayout:
    """How what the model's layers keep is kept there. Raises ValueError if that attention, or that dtype, is not to be
    had."""
    specs = [spec if spec and spec.owner is None else None for spec in model.cache_specs]
    asked = {"attention": attention, "kv_cache_dtype": kv_cache_dtype}
    name = next((name for name, value in asked.items() if value != "auto"), None)
    if name is not None and not any(spec.heads for spec in specs if spec):
        raise ValueError(f"{name} is {asked[name]!r}: no layer of this model keeps keys and values; leave it out")
    of = model.dtype, placement, attention, kv_cache_dtype, model.weight_dtype
    kinds = {spec: LayerLayout.of(spec, *of) for spec in specs if spec}
    owners = [(i, spec.owner) for i, spec in enumerate(model.cache_specs) if spec]
    shared = tuple((i, owner) for i, owner in owners if owner is not None)
    return CacheLayout.of([kinds.get(spec) if spec else None for spec in specs], model.config.max_context, shared)


def placed_params(model: AbstractModel, placement: jax.Device | Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The weights, each with how it is split there."""
    return {name: model.with_sharding(name, placement) for name in model.abstract}


def placed_decode_state(model: AbstractModel, placement: jax.Device | Mesh, max_rows: int) -> DecodeState:
    """Slots for `max_rows` sequences on each shard of rows."""
    vocab = model.config.vocab_size
    if not isinstance(placement, Mesh):
        return structs(DecodeState.shapes(max_rows, vocab), SingleDeviceSharding(placement))
    shards = axis_size(placement, ROWS)
    slots = DecodeState.shapes(shards * (max_rows + 1) - 1, vocab, shards)
    specs = DecodeState.specs(vocab, placement)
    return DecodeState(
        **{name: structs(getattr(slots, name), NamedSharding(placement, spec)) for name, spec in specs.items()}
    )


def placed_hidden(model: AbstractModel, placement: jax.Device | Mesh, max_tokens: int) -> jax.Array:
    """Hidden states of `max_tokens` tokens on each shard of rows."""
    mesh = placement if isinstance(placement, Mesh) else None
    sharding = NamedSharding(mesh, PartitionSpec(ROWS)) if mesh is not None else SingleDeviceSharding(placement)
    shape = axis_size(mesh, ROWS) * max_tokens, model.config.hidden_size
    return cast(jax.Array, jax.ShapeDtypeStruct(shape, model.dtype, sharding=sharding))


@dataclass(frozen=True)
class ModelPrograms:
    """Programs of a model on one device or a mesh, by key.

    model, placement: what runs, and on which device or mesh.

    Where the mesh splits rows, `shards` of them, all sizes are of one shard; arrays hold them one after the other.
    """

    model: AbstractModel
    placement: jax.Device | Mesh

    @property
    def table(self) -> Mapping[Key, Program[Any]]:
        """All that can be needed, known before the first request."""
        raise NotImplementedError

    def keys(self) -> list[Key]:
        """Of all of them."""
        return list(self.table)

    def __getitem__(self, key: Key) -> Program[Any]:
        return self.table[key]

    @property
    def facts(self) -> dict[str, Any]:
        """What programs are made from besides model, place and arguments."""
        raise NotImplementedError

    @property
    def options(self) -> dict[str, Any]:
        """Those of `LLM` that shape programs, as they were decided."""
        mesh = "tensor=1" if self.mesh is None else describe(self.mesh)
        return {"dtype": str(self.model.weight_dtype), "mesh": mesh, "quantization": self.model.quantization}

    @property
    def mesh(self) -> Mesh | None:
        return self.placement if isinstance(self.placement, Mesh) else None

    @property
    def devices(self) -> list[jax.Device]:
        """Those of the mesh, in its order."""
        return devices_of(self.placement)

    @property
    def shards(self) -> int:
        """Of rows."""
        return axis_size(self.mesh, ROWS)

    @cached_property
    def whole(self) -> Sharding:
        """Of what every device has the same of."""
        return replicated(self.placement) if isinstance(self.placement, Mesh) else SingleDeviceSharding(self.placement)

    @cached_property
    def params(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The weights."""
        return placed_params(self.model, self.placement)

    @property
    def axes(self) -> Mapping[str, Axes]:
        """Their logical axes."""
        return self.model.axes

    @property
    def state(self) -> State:
        """What stays on the devices from one call to the next, abstractly."""
        return State()

    def like(self, tree: T) -> T:
        """Arguments that the host gives, abstractly."""
        return structs(tree, self.whole)

    def ints(self, first: int, *shape: int) -> jax.Array:
        """An array of integers, `first` of each shard of rows, abstractly."""
        return cast(jax.Array, jax.ShapeDtypeStruct((self.shards * first, *shape), np.int32, sharding=self.whole))


@dataclass(frozen=True)
class EngineShapes(ModelPrograms):
    """Those over a cache of pages. Each shard of rows has its own slots and pages.

    buckets: sizes of calls.
    num_pages, page_size: of the cache's first pool, page 0 among them, and tokens of each.
    max_model_len: most tokens of a sequence.
    max_rows: sequences that run at once.
    max_steps: tokens a row that one decoding call may produce.
    attention, kv_cache_dtype: see EngineConfig.
    snapshots: states that are kept beside those of sequences that run.
    adapter_limits: what adapters may be.
    """

    buckets: Buckets
    num_pages: int
    page_size: int
    max_model_len: int
    max_rows: int
    max_steps: int
    attention: str = "auto"
    kv_cache_dtype: str = "auto"
    snapshots: int = 0
    adapter_limits: AdapterLimits = NO_ADAPTERS

    @property
    def facts(self) -> dict[str, Any]:
        sizes = self.page_counts, self.page_size, self.max_model_len, self.max_rows, self.max_steps, self.snapshots
        return {"attention": self.layout.names, "sizes": [str(self.buckets), *sizes]}

    @property
    def options(self) -> dict[str, Any]:
        return (
            super().options
            | {
                "max_model_len": self.max_model_len,
                "max_num_seqs": self.max_rows * self.shards,
                "max_num_batched_tokens": self.max_tokens * self.shards,
                "page_size": self.page_size,
                "attention": self.attention,
                "kv_cache_dtype": self.kv_cache_dtype,
            }
            | self.adapter_limits.options
        )

    @cached_property
    def layout(self) -> CacheLayout:
        """Of the cache."""
        return cache_layout(self.model, self.placement, self.attention, self.kv_cache_dtype)

    @property
    def max_tokens(self) -> int:
        """Of a mixed call."""
        return self.buckets.tokens[-1]

    @property
    def reach(self) -> int:
        """Most tokens of one sequence that a call writes."""
        return reach(self.max_tokens, self.max_steps)

    @cached_property
    def page_counts(self) -> tuple[int, ...]:
        """Of each pool of pages, page 0 among them; of one shard."""
        return self.layout.counts(self.num_pages, self.page_size, self.reach, self.max_model_len)

    def capacity(self, context: int) -> int:
        """Tokens that the cache has room for, in sequences that decode and have `context` each; of all shards."""
        if not self.layout.pools:
            return self.shards * self.max_rows * context
        return self.shards * self.layout.capacity(self.page_counts, context, self.page_size, self.max_steps)

    @property
    def cache_tokens(self) -> int:
        """The same in sequences of the longest kind."""
        return self.capacity(self.max_model_len)

    @cached_property
    def layer_map(self) -> LayerMap:
        """Which layer has which part of the cache."""
        return self.layout.layer_map(self.page_size)

    @cached_property
    def table_widths(self) -> tuple[int, ...]:
        """Most pages of a sequence in each group's table; 0 of those that have slots."""
        most = self.max_model_len, self.page_size, self.reach
        return tuple(0 if group.pool is None else group.most_pages(*most) for group in self.layout.groups)

    @cached_property
    def state(self) -> State:
        """All of it."""
        cache = self.layout.arrays(self.page_counts, self.page_size, self.max_rows + self.snapshots)
        slots = placed_decode_state(self.model, self.placement, self.max_rows)
        hidden = placed_hidden(self.model, self.placement, self.max_tokens)
        return State(cache, slots, hidden, self.adapters or None)  # type: ignore[arg-type]

    @cached_property
    def adapter(self) -> dict[str, LowRank]:
        """One of them, as the host gives it, by the names of weights."""
        return one_adapter(self.model, self.placement, self.adapter_limits)

    @cached_property
    def adapters(self) -> dict[str, LowRank]:
        """Their slots, by the names of weights."""
        return placed_adapters(self.model, self.placement, self.adapter_limits)

    def tables(self, rows: int) -> tuple[Table | None, ...]:
        """The page tables of so many rows, abstractly."""
        return tuple(
            Table(self.ints(rows, width), self.ints(rows) if group.forgets else None) if width else None
            for group, width in zip(self.layout.groups, self.table_widths, strict=True)
        )


S = TypeVar("S", bound=ModelPrograms)
# A program's function: parameters by name, state that it changes (donated), state that it reads, what the host gives
# it -> what the host gets, the changed state.
Function = Callable[..., tuple[object, State]]


class Program(ABC, Generic[S]):
    """A pure function that runs on the devices, for batches of one size.

    kind: what it does.
    size: tokens or rows (of each shard).
    key: both, its name in manifests and between hosts.
    changes, reads: the parts of the state that it takes.
    adapted: some rows have adapters. The host then gives it, after all else, i32 of each row, which slot's it has; as
        many as there are slots for none.
    """

    kind: ClassVar[str]
    changes: ClassVar[Collection[str]] = ()
    reads: ClassVar[Collection[str]] = ()

    def __init__(self, shapes: S, size: int = 1, adapted: bool = False):
        self.shapes, self.size, self.adapted = shapes, size, adapted
        self.key: Key = (adapted_kind(self.kind) if adapted else self.kind, size)
        if adapted:
            self.reads = (*self.reads, "adapters")  # type: ignore[misc]

    @property
    def weights(self) -> Collection[str]:
        """Names of the parameters that it takes: all, where it says nothing else."""
        return self.shapes.params

    @property
    @abstractmethod
    def inputs(self) -> tuple[object, ...]:
        """What the host gives it, abstractly."""

    def bind(self, params: Params, read: State, slot: jax.Array | None) -> CausalLM:
        """The module, with adapters where it is `adapted`. slot: of each token."""
        return self.shapes.model.bind(params, read.adapters, slot)

    @property
    @abstractmethod
    def result(self) -> object:
        """The structure of what the host gets, with anything for leaves."""

    @abstractmethod
    def function(self) -> Function:
        """What it computes."""

    @property
    def arguments(self) -> tuple[object, ...]:
        """All that it takes, abstractly."""
        params, state = {name: self.shapes.params[name] for name in self.weights}, self.shapes.state
        return params, state.only(self.changes), state.only(self.reads), *self.inputs

    @property
    def results(self) -> tuple[object, State]:
        """The structure of all that it gives."""
        return self.result, self.shapes.state.only(self.changes)

    def run(
        self, executable: jax.stages.Compiled, params: Params, state: State, inputs: tuple[object, ...]
    ) -> tuple[object, State]:
        """Calls it, compiled: what the host gets, and the state after it."""
        taken = params if len(self.weights) == len(params) else {name: params[name] for name in self.weights}
        result, changed = executable(taken, state.only(self.changes), state.only(self.reads), *inputs)
        return result, state.updated(changed)

    def lower(self) -> jax.stages.Lowered:
        """The program before it is compiled."""
        shapes = self.shapes
        placement: jax.Device | Mesh = shapes.placement
        on_tpu = shapes.devices[0].platform == "tpu"
        if not isinstance(placement, Mesh) and on_tpu:
            placement = Mesh(np.array(shapes.devices), ("all",))
        # Results' shardings are pinned, or XLA may choose others, and donation is silently lost.
        held = jax.tree.map(lambda s: s.sharding, self.results[1])
        jitted = jax.jit(
            self.function(),
            donate_argnums=1,
            out_shardings=(shapes.whole, held),
            compiler_options=TPU_OPTIONS if on_tpu else None,
        )
        with contextlib.ExitStack() as stack:
            if isinstance(placement, Mesh):  # kernels ask what kind of device they are for
                stack.enter_context(jax.sharding.use_abstract_mesh(placement.abstract_mesh))
            # JAX has a GPU's from the device, where "gpu" is a family that it knows only if one of it is there.
            return jitted.trace(*self.arguments).lower(lowering_platforms=("tpu",) if on_tpu else None)

    def over_rows(self, function: Function, input_specs: tuple[object, ...], result: object) -> Function:
        """A function that is written for one shard of rows, for all of them: each runs its own. What tensor devices do
        within a shard is left to XLA. input_specs, result: how what the host gives and gets is split."""
        mesh, axes = self.shapes.mesh, self.shapes.axes
        if mesh is None:
            return function
        params = {name: on_axes(axes[name], ROWS) for name in self.weights}
        if self.adapted:
            input_specs = *input_specs, PartitionSpec(ROWS)

        def split(parts: Collection[str]) -> State:
            specs: dict[str, Any] = dict.fromkeys(parts, PartitionSpec(ROWS))
            if self.adapted and "adapters" in parts:
                axes = {name: adapter_axes(self.shapes.model, name).arrays for name in self.shapes.state.adapters}
                specs["adapters"] = {
                    name: LowRank(*(on_axes(own, ROWS) for own in arrays))  # type: ignore[arg-type]
                    for name, arrays in axes.items()
                }
            return State(**specs)

        return jax.shard_map(
            function,
            mesh=mesh,
            axis_names=set(ROWS),
            in_specs=(params, split(self.changes), split(self.reads), *input_specs),
            out_specs=(result, split(self.changes)),
            check_vma=False,
        )


def adapted_kind(kind: str) -> str:
    """Of a program's variant for rows with adapters."""
    return f"adapted_{kind}"


def structs(tree: T, sharding: Sharding) -> T:
    """Arrays, abstractly."""
    return cast(T, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree))
