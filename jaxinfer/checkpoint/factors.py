"""An adapter beside a model's weights, as these are kept here: what it adds to the products with each of them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxinfer.checkpoint.adapter import Adapter, Array, Change, by_expert
from jaxinfer.checkpoint.files import some
from jaxinfer.checkpoint.merged import APART, OTHER_NAMES
from jaxinfer.errors import CheckpointError
from jaxinfer.models.model import AbstractModel
from jaxinfer.models.params import ParamSpec
from jaxinfer.models.sources import Source, whole
from jaxinfer.models.weights import spelled
from jaxinfer.weights import LowRank

# Of each module that changes some of a weight, and the inputs that it takes of it: which rows are which of its own.
Parts = dict[tuple[str, tuple[int, ...]], list[tuple[slice, slice]]]


TRANSFORMERS_NAMES = {theirs: ours for ours, theirs in OTHER_NAMES.items()}  # of modules, by those of checkpoints
KINDS = ("a", "b", "magnitude", "bias", "rows")  # of a Change what are tensors


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """One in memory.

    folder: where it is from.
    rank: the largest that a weight needs.
    factors: of each weight that it changes, by name: a `[r, in]`, b `[r, out]`, gain and shift `[out]` as in LowRank;
        but where it is `scaled` gain has the lengths of rows, NaN where nothing is said.
    scaled: it is of DoRA.
    digest: of all that.
    """

    folder: str
    rank: int
    factors: Mapping[str, LowRank]
    scaled: bool
    digest: bytes

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for own in self.factors.values() for array in own.arrays)


class AdapterInfo(NamedTuple):
    """What there is to say of one.

    folder: where it is from. rank: the largest of a weight. nbytes: that it takes. weights: that it changes.
    digest: of its content.
    """

    folder: str
    rank: int
    nbytes: int
    weights: int
    digest: bytes

    @classmethod
    def of(cls, loaded: LoadedAdapter) -> AdapterInfo:
        return cls(loaded.folder, loaded.rank, loaded.nbytes, len(loaded.factors), loaded.digest)


class Base(Protocol):
    """What is asked of the weights of the model."""

    def values(self, name: str) -> Array:
        """A vector."""

    def rows(self, name: str, ids: Sequence[int] | Array) -> Array:
        """Rows of the table or of the head, as float32."""


def read_adapter(folder: str | os.PathLike[str], model: AbstractModel, max_rank: int, base: Base) -> LoadedAdapter:
    """Reads PEFT's folder. Raises FileNotFoundError, and CheckpointError for an adapter of another model and for what
    can't be beside weights."""
    with Adapter(folder) as adapter:
        factors = _Factors(adapter, model, base).all()
        adapter.warn_if_idle()
    rank = max((own.b.shape[-2] for own in factors.values()), default=0)
    if rank > max_rank:
        raise CheckpointError(f"{folder}: is of rank {rank}, and max_lora_rank is {max_rank}: raise that")
    digest = hashlib.blake2b(digest_size=32)
    for name, own in sorted(factors.items()):
        digest.update(name.encode() + b"\0")
        for array in own.arrays:
            digest.update(np.asarray(array).tobytes())
    scaled = any(own.gain is not None and not np.isnan(own.gain).all() for own in factors.values())
    if not scaled:
        factors = {
            name: own if own.gain is None else dataclasses.replace(own, gain=np.ones_like(own.gain))  # type: ignore[arg-type]
            for name, own in factors.items()
        }
    return LoadedAdapter(os.fspath(folder), rank, factors, scaled, digest.digest())


def changes(folder: str | os.PathLike[str], model: AbstractModel) -> tuple[bool, bool]:
    """Whether one changes the table or the head, and whether it changes experts. Raises what Adapter raises."""
    with Adapter(folder) as adapter:
        factors = _Factors(adapter, model)
        stacked = (spec for spec in model.adaptable.values() if len(spec.shape) > 2)
        return factors.of_vocabulary, any(factors.of_experts(spec) for spec in stacked)


class _Weight:
    """What an adapter makes of one: factors of several sources one after the other. rows, columns: of its products."""

    def __init__(self, columns: int, rows: int):
        self.a, self.b = [np.zeros((0, columns), np.float32)], [np.zeros((0, rows), np.float32)]
        self.gain, self.shift = np.full(rows, np.nan, np.float32), np.zeros(rows, np.float32)

    def add(self, a: Array, b: Array) -> None:
        """`[r, in]` and `[r, out]`, with the adapter's scale."""
        self.a.append(a)
        self.b.append(b)

    def low_rank(self, dtype: Any, is_table: bool = False) -> LowRank:
        a, b = np.concatenate(self.a).astype(dtype), np.concatenate(self.b).astype(dtype)
        return LowRank(a.T if is_table else a, b, self.gain, self.shift)  # type: ignore[arg-type]


class _Factors:
    """What is made of an adapter, and of which of its tensors nothing was."""

    def __init__(self, adapter: Adapter, model: AbstractModel, base: Base | None = None):
        self._adapter, self._model, self._base_or_none = adapter, model, base
        self._read = functools.lru_cache(4)(self._finite)  # those of all experts are asked for by each part of them
        own = model.weights.own
        self._changes = {own(f"{module}.weight"): module for module in adapter.changes}
        self._saved = {own(name): name for name in adapter.saved}
        self._left = {*adapter.changes, *adapter.saved}
        self._shapes: list[str] = []

    @property
    def of_vocabulary(self) -> bool:
        """Whether the table or the head is changed."""
        return bool(self._changes.keys() & {self._model.weights.embedding, self._model.weights.head})

    @property
    def _base(self) -> Base:
        assert self._base_or_none is not None
        return self._base_or_none

    def all(self) -> dict[str, LowRank]:
        weights, stacked = {}, {}
        for name, spec in self._model.adaptable.items():
            if len(spec.shape) > 2:
                if places := self.of_experts(spec):
                    stacked[name] = self._stacked(spec, places)
            elif name not in self._model.vocabulary and (own := self._of(name, spec)) is not None:
                weights[name] = own
        weights |= self._of_vocabulary()
        if self._shapes:
            raise CheckpointError(
                f"{self._adapter.folder}: is not an adapter of this model: other shapes: {some(self._shapes)}"
            )
        self._check_left()
        table, dtype = self._model.vocabulary[0], self._model.weight_dtype
        return stacked | {name: own.low_rank(dtype, name == table) for name, own in weights.items()}

    def _of(self, name: str, spec: ParamSpec) -> _Weight | None:
        parts: Parts = {}
        for source in (spec.source, *(source for source, _ in spec.elsewhere)):
            if parts := self._parts(spec, source):
                break
        rows, columns = spec.shape
        shift = self._shift(name.removesuffix("weight") + "bias", rows)
        if not parts and shift is None:
            return None
        weight = _Weight(columns, rows)
        weight.shift += 0 if shift is None else shift
        for (module, inputs), places in parts.items():
            change = self._adapter.changes[module]
            self._left.discard(module)
            a, b = self._factors(change)
            placed = np.zeros((len(a), rows), np.float32)
            for ours, theirs in places:
                placed[:, ours] = b[:, theirs]
                if change.magnitude is not None:
                    weight.gain[ours] = self._read(change.magnitude).reshape(-1)[theirs]
                if change.bias is not None:
                    weight.shift[ours] += change.scale * self._read(change.bias)[theirs]
            weight.add(a[:, slice(*inputs)], placed)
        return weight

    def _finite(self, name: str) -> Array:
        values = self._adapter.read(name)
        if not np.isfinite(values).all():
            raise CheckpointError(f"{self._adapter.folder}: {name} has numbers that are not finite: it is damaged")
        return values

    def _factors(self, change: Change) -> tuple[Array, Array]:
        """`[r, in]` and `[r, out]`, with the scale."""
        assert change.a is not None
        assert change.b is not None
        return self._read(change.a), self._read(change.b).T * change.scale

    def of_experts(self, spec: ParamSpec) -> list[tuple[int, str, int | None, slice]]:
        """Of experts that are changed: which one, by which module's factors, by which of these where they are of all
        experts, and by which of their rows."""
        experts, rows, _ = spec.shape
        places: list[tuple[int, str, int | None, slice]] = []
        for source in (spec.source, *(source for source, _ in spec.elsewhere)):
            regions = list(source.regions(whole(spec.shape)))
            for region in regions:
                module = self._module(region.tensor) or self._module(f"{region.tensor}.weight")
                if module is None:
                    continue
                *which, one, other = region.stored
                first = region.index[0]
                ours = [first] if isinstance(first, int) else range(experts)[first]
                for i, expert in enumerate(ours):
                    theirs = range(*which[0])[i] if which else None
                    places.append((expert, module, theirs, slice(*(other if region.transposed else one))))
            if places:
                return places
            # Each has its own, and in transformers all are one parameter, in which parts come one after another.
            parent, _, part = regions[0].tensor.removesuffix(".weight").rpartition(".")
            for fused, parts in ((fused, parts) for fused, spellings in APART.items() for parts in spellings):
                module = self._module(f"{parent.rpartition('.')[0]}.{fused}.weight")
                if part in parts and module is not None:
                    start = parts.index(part) * rows
                    return [(expert, module, expert, slice(start, start + rows)) for expert in range(experts)]
        return []

    def _stacked(self, spec: ParamSpec, places: list[tuple[int, str, int | None, slice]]) -> LowRank:
        experts, rows, columns = spec.shape
        dtype = self._model.weight_dtype

        @functools.cache  # each is of all experts, or of one
        def of(module: str, count: int, stop: int) -> tuple[Array, Array]:
            change = self._adapter.changes[module]
            self._left.discard(module)
            if change.magnitude is not None or change.bias is not None:
                raise self._refused([module], "lengths and biases of experts")
            a, b = self._factors(change)
            if a.shape[1] != columns or len(a) % count or b.shape[1] < stop or len(b) % count:
                raise CheckpointError(
                    f"{self._adapter.folder}: is not an adapter of this model: other shapes: {module} "
                    f"{list(spec.shape)} by {[*b.shape[::-1]]} and {list(a.shape)}"
                )
            return by_expert(a, b.T, count)

        factors = []
        for expert, module, which, out in places:
            a, b = of(module, 1 if which is None else experts, out.stop)
            factors.append((expert, a[which or 0], b[which or 0, out].T))
        rank = max(len(a) for _, a, _ in factors)
        both = np.zeros((experts, rank, columns), dtype), np.zeros((experts, rank, rows), dtype)
        for expert, a, b in factors:
            both[0][expert, : len(a)], both[1][expert, : len(b)] = a, b
        return LowRank(*both)  # type: ignore[arg-type]

    def _of_vocabulary(self) -> dict[str, _Weight]:
        """Of the table and of the head. Rows that are replaced are factors, too: one of each picks a row, the other is
        what it becomes, less what it is."""
        names, weights = self._model.vocabulary, self._model.weights
        (vocab, width), tied = self._model.params[names[0]].shape, names[1] not in self._model.params
        table, head = _Weight(vocab, width), _Weight(width, vocab)
        for tensor, own in ((weights.embedding, table), (weights.head, head)):
            self._check_saved(tensor, names[0] if own is table or tied else names[1], (vocab, width))
            module = self._changes.get(tensor)
            if module is None:
                continue
            self._left.remove(module)
            change = self._adapter.changes[module]
            sizes = self._sizes(change)
            wanted = {"a": vocab, "b": width, "magnitude": width} if own is table else {"a": width, "b": vocab}
            wanted = {"magnitude": vocab, "bias": vocab, "rows": width} | wanted
            if any(size != wanted[kind] for kind, size in sizes.items()) or max(change.tokens, default=0) >= vocab:
                self._shapes.append(f"{module} {[vocab, width]} by {sizes}")
                continue
            if change.a is not None:
                a, b = self._factors(change)
                own.add(a, b)
                if own is table and tied and self._adapter.config.ties and weights.head not in self._changes:
                    head.add(b, a)
                    if change.magnitude is not None:
                        raise self._refused([module], "lengths of a table that is the head, too")
            if change.magnitude is not None:
                own.gain[:] = self._read(change.magnitude).reshape(-1)
            if change.bias is not None:
                own.shift += change.scale * self._read(change.bias)
            if change.rows is not None:
                picked = np.zeros((len(change.tokens), vocab), np.float32)
                picked[np.arange(len(change.tokens)), list(change.tokens)] = 1
                name = names[0] if own is table or tied else names[1]
                others = self._read(change.rows) - self._base.rows(name, change.tokens)
                if own is table:
                    table.add(picked, others)
                if own is head or (tied and weights.head not in self._changes):
                    head.add(others, picked)
        both = zip(names, (table, head), strict=True)
        return {name: own for name, own in both if len(own.a) > 1 or own.shift.any()}

    def _sizes(self, change: Change) -> dict[str, int]:
        """Of what there is: of factors the side that is not the rank."""
        info = self._adapter.info
        shapes = {kind: info(name).shape for kind, name in vars(change).items() if kind in KINDS and name is not None}
        return {
            kind: int(shape[0] if kind == "b" else np.prod(shape) if kind in ("magnitude", "bias") else shape[1])
            for kind, shape in shapes.items()
        }

    def _check_saved(self, tensor: str, name: str, shape: tuple[int, ...]) -> None:
        """PEFT writes whole tables beside factors of them. One that is the model's own is nothing new."""
        saved = self._saved.get(tensor)
        if saved is None:
            return
        there = self._adapter.saved[saved]
        size = self._adapter.info(there).shape
        if size == shape:
            step = max(1, 2**22 // shape[1])
            for start in range(0, shape[0], step):
                ids = np.arange(start, min(start + step, shape[0]))
                ours = self._base.rows(name, ids)
                theirs = self._adapter.read(there, (slice(start, start + len(ids)),))
                if not np.array_equal(theirs.astype(self._model.weight_dtype).astype(np.float32), ours):
                    break
            else:
                self._left.remove(saved)
                return
        gib = np.prod(size) * self._model.weight_dtype.itemsize / 2**30
        raise self._refused([saved], f"tables of a model's vocabulary as a whole, {list(size)}, {gib:.2f} GiB a slot")

    def _parts(self, spec: ParamSpec, source: Source) -> Parts:
        """Where a weight is changed, if a checkpoint has it there."""
        parts: Parts = {}
        shapes = source.tensors(spec.shape)
        for region in source.regions(whole(spec.shape)):
            module = self._module(region.tensor)
            if module is None:
                continue
            change, shape = self._adapter.changes[module], shapes[region.tensor]
            (rows, columns), index = region.stored[:: -1 if region.transposed else 1], region.index
            if change.a is None:
                continue
            sizes = self._sizes(change)
            out, into = shape[::-1] if region.transposed else shape
            wanted = {"a": into, "b": out, "magnitude": out, "bias": out}
            if any(size != wanted.get(kind) for kind, size in sizes.items()):
                self._shapes.append(f"{module} {[out, into]} by {sizes}")
                continue
            assert isinstance(index[0], slice)
            assert index[1] == slice(0, spec.shape[1]), "a weight is of whole rows of others"
            parts.setdefault((module, columns), []).append((index[0], slice(*rows)))
        return parts

    def _module(self, tensor: str) -> str | None:
        own = self._model.weights.own
        names = (own(tensor), own(spelled(tensor, TRANSFORMERS_NAMES)))
        return next((self._changes[name] for name in names if name in self._changes), None)

    def _shift(self, name: str, rows: int) -> Array | None:
        """What becomes of a bias that is saved as a whole, less what it is."""
        spec = self._model.params.get(name)
        if spec is None:
            return None
        own, adapter = self._model.weights.own, self._adapter
        shapes = spec.source.tensors(spec.shape)
        names = {tensor: self._saved[own(tensor)] for tensor in shapes if own(tensor) in self._saved}
        if len(names) < len(shapes):
            return None
        for tensor, saved in names.items():
            self._left.discard(saved)
            if (shape := adapter.info(adapter.saved[saved]).shape) != shapes[tensor]:
                self._shapes.append(f"{saved} {list(shapes[tensor])} by {list(shape)}")
                return None

        def read(tensor: str, index: tuple[slice, ...]) -> Array:
            return self._read(adapter.saved[names[tensor]])[index]

        return spec.source.read(whole(spec.shape), read) - self._base.values(name)[:rows].astype(np.float32)

    def _check_left(self) -> None:
        own, specs = self._model.weights.own, self._model.params.values()
        known = {own(tensor) for spec in specs for tensor in spec.source.tensors(spec.shape)}
        known |= {spelled(tensor, TRANSFORMERS_NAMES) for tensor in known}

        def is_there(name: str) -> bool:
            whole = own(name if name in self._adapter.saved else f"{name}.weight")
            parent = whole.removesuffix(".weight").rpartition(".")[0]
            return any(tensor == whole or (parent and tensor.startswith(f"{parent}.")) for tensor in known)

        if others := [name for name in self._left if not is_there(name)]:
            raise CheckpointError(
                f"{self._adapter.folder}: is not an adapter of this model, which has no {some(sorted(others))}"
            )
        if self._left:
            raise self._refused(self._left, "norms, routers and others")

    def _refused(self, names: Iterable[str], what: str) -> CheckpointError:
        return CheckpointError(
            f"{self._adapter.folder}: changes {some(sorted(names))}; beside weights there are no {what}: merge it, "
            "jaxinfer merge BASE ADAPTER DST"
        )
