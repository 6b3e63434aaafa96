"""An adapter beside a model's weights, as these are kept here: what it adds to the products with each of them."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxinfer.checkpoint.adapter import Adapter, Array
from jaxinfer.checkpoint.files import some
from jaxinfer.checkpoint.merged import OTHER_NAMES
from jaxinfer.errors import CheckpointError
from jaxinfer.models.model import AbstractModel
from jaxinfer.models.params import ParamSpec
from jaxinfer.models.sources import Source, whole
from jaxinfer.models.weights import spelled
from jaxinfer.weights import LowRank

# Of each module that changes some of a weight, and the inputs that it takes of it: which rows are which of its own.
Parts = dict[tuple[str, tuple[int, ...]], list[tuple[slice, slice]]]


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
        return sum(array.nbytes for own in self.factors.values() for array in vars(own).values())


class AdapterInfo(NamedTuple):
    """What there is to say of one.

    folder: where it is from. rank: the largest of a weight. nbytes: that it takes. weights: that it changes.
    """

    folder: str
    rank: int
    nbytes: int
    weights: int

    @classmethod
    def of(cls, loaded: LoadedAdapter) -> AdapterInfo:
        return cls(loaded.folder, loaded.rank, loaded.nbytes, len(loaded.factors))


def read_adapter(
    folder: str | os.PathLike[str], model: AbstractModel, max_rank: int, bias_of: Callable[[str], Array]
) -> LoadedAdapter:
    """Reads PEFT's folder. bias_of: the values of a bias of the model. Raises FileNotFoundError, and CheckpointError
    for an adapter of another model and for what can't be beside weights."""
    with Adapter(folder) as adapter:
        factors = _Factors(adapter, model, bias_of).all()
    rank = max((len(own.a) for own in factors.values()), default=0)
    if rank > max_rank:
        raise CheckpointError(f"{folder}: is of rank {rank}, and max_lora_rank is {max_rank}: raise that")
    digest = hashlib.blake2b(digest_size=32)
    for name, own in sorted(factors.items()):
        digest.update(name.encode() + b"\0")
        for array in vars(own).values():
            digest.update(np.ascontiguousarray(array).view(np.uint8))
    scaled = any(not np.isnan(own.gain).all() for own in factors.values())
    if not scaled:
        factors = {name: dataclasses.replace(own, gain=np.ones_like(own.gain)) for name, own in factors.items()}
    return LoadedAdapter(os.fspath(folder), rank, factors, scaled, digest.digest())


class _Factors:
    """What is made of an adapter, and of which of its tensors nothing was."""

    def __init__(self, adapter: Adapter, model: AbstractModel, bias_of: Callable[[str], Array]):
        self._adapter, self._model, self._bias_of = adapter, model, bias_of
        own = model.weights.own
        self._changes = {own(f"{module}.weight"): module for module in adapter.changes}
        self._saved = {own(name): name for name in adapter.saved}
        self._left = {**dict.fromkeys(adapter.changes), **dict.fromkeys(adapter.saved)}
        self._shapes: list[str] = []

    def all(self) -> dict[str, LowRank]:
        factors = {}
        for name, spec in self._model.adaptable.items():
            if (own := self._of(name, spec)) is not None:
                factors[name] = own
        if self._shapes:
            raise CheckpointError(
                f"{self._adapter.folder}: is not an adapter of this model: other shapes: {some(self._shapes)}"
            )
        self._check_left()
        return factors

    def _of(self, name: str, spec: ParamSpec) -> LowRank | None:
        parts: Parts = {}
        for source in (spec.source, *(source for source, _ in spec.elsewhere)):
            if parts := self._parts(spec, source):
                break
        rows, columns = spec.shape
        shift = self._shift(name.removesuffix("weight") + "bias", rows)
        if not parts and shift is None:
            return None
        dtype = self._model.weight_dtype
        a, b = [np.zeros((0, columns), np.float32)], [np.zeros((0, rows), np.float32)]
        gain = np.full(rows, np.nan, np.float32)
        shift = np.zeros(rows, np.float32) if shift is None else shift
        for (module, inputs), places in parts.items():
            change = self._adapter.changes[module]
            self._left.pop(module, None)
            assert change.a is not None
            assert change.b is not None
            own_a, own_b = (
                self._adapter.read(change.a)[:, slice(*inputs)],
                self._adapter.read(change.b).T * change.scale,
            )
            placed = np.zeros((len(own_a), rows), np.float32)
            for ours, theirs in places:
                placed[:, ours] = own_b[:, theirs]
                if change.magnitude is not None:
                    gain[ours] = self._adapter.read(change.magnitude).reshape(-1)[theirs]
                if change.bias is not None:
                    shift[ours] += change.scale * self._adapter.read(change.bias)[theirs]
            a.append(own_a)
            b.append(placed)
        return LowRank(np.concatenate(a).astype(dtype), np.concatenate(b).astype(dtype), gain, shift)  # type: ignore[arg-type]

    def _parts(self, spec: ParamSpec, source: Source) -> Parts:
        """Where a weight is changed, if a checkpoint has it there."""
        parts: Parts = {}
        shapes = source.tensors(spec.shape)
        for region in source.regions(whole(spec.shape)):
            module = self._module(region.tensor)
            if module is None:
                continue
            change, shape = self._adapter.changes[module], shapes[region.tensor]
            turned = region.transposed
            (rows, columns), index = region.stored[:: -1 if turned else 1], region.index
            if change.a is None or change.b is None:
                continue
            theirs = self._adapter.info(change.b).shape[0], self._adapter.info(change.a).shape[1]
            sizes = [self._adapter.info(own).shape for own in (change.magnitude, change.bias) if own is not None]
            if theirs != (shape[::-1] if turned else shape) or any(np.prod(size) != theirs[0] for size in sizes):
                self._shapes.append(f"{module} {list(shape)} by {list(theirs)} {' '.join(map(str, sizes))}".rstrip())
                continue
            assert isinstance(index[0], slice)
            assert index[1] == slice(0, spec.shape[1]), "a weight is of whole rows of others"
            parts.setdefault((module, columns), []).append((index[0], slice(*rows)))
        return parts

    def _module(self, tensor: str) -> str | None:
        own = self._model.weights.own
        names = (own(tensor), own(spelled(tensor, {theirs: ours for ours, theirs in OTHER_NAMES.items()})))
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
            self._left.pop(saved)
            if (shape := adapter.info(adapter.saved[saved]).shape) != shapes[tensor]:
                self._shapes.append(f"{saved} {list(shapes[tensor])} by {list(shape)}")
                return None

        def read(tensor: str, index: tuple[slice, ...]) -> Array:
            return adapter.read(adapter.saved[names[tensor]], index)

        return spec.source.read(whole(spec.shape), read) - self._bias_of(name)[:rows].astype(np.float32)

    def _check_left(self) -> None:
        own, specs = self._model.weights.own, self._model.params.values()
        known = [own(tensor) for spec in specs for tensor in spec.source.tensors(spec.shape)]

        def is_there(name: str) -> bool:
            whole = own(name if name in self._adapter.saved else f"{name}.weight")
            parent = whole.removesuffix(".weight").rpartition(".")[0]
            return any(tensor == whole or (parent and tensor.startswith(f"{parent}.")) for tensor in known)

        if others := [name for name in self._left if not is_there(name)]:
            raise CheckpointError(
                f"{self._adapter.folder}: is not an adapter of this model, which has no {some(sorted(others))}"
            )
        if self._left:
            raise CheckpointError(
                f"{self._adapter.folder}: changes {some(sorted(self._left))}; beside weights there are adapters of the "
                "layers' matrices alone: merge it, jaxinfer merge BASE ADAPTER DST"
            )
