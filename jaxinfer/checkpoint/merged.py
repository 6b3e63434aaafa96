"""A checkpoint as it is with an adapter: each tensor is merged when it is read, and never as a whole unless it is asked
for as one."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxinfer.checkpoint.adapter import Adapter, Change, by_expert
from jaxinfer.checkpoint.files import some
from jaxinfer.checkpoint.folder import Checkpoint, DerivedCheckpoint
from jaxinfer.checkpoint.tensors import Array, Shape, TensorInfo
from jaxinfer.errors import CheckpointError
from jaxinfer.models.registry import parse_config
from jaxinfer.models.weights import spelled
from jaxinfer.models.wrapped import TEXT
from jaxinfer.quantization.stored import stored_quantization

# Where matrices are [in, out], by the number of axes: where both are as many, shapes don't say so. They are those of
# transformers' Conv1D, and of its experts that are called transposed.
TURNED = {2: "gpt2", 3: "gpt_oss"}
# Parts of a parameter of all experts, by their names where each expert has its own; the second are Mixtral's.
APART = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}
# What a module is called in the checkpoints of some families.
OTHER_NAMES = {".mlp.": ".block_sparse_moe."}


@dataclass(frozen=True)
class _Low:
    """A low-rank change of one tensor.

    change: the adapter's. turned: the tensor is `[..., in, out]`. experts: of the factors; 0: they are matrices.
    expert: whose the tensor is; None: it is all experts'. first, rows: which of b's rows are the tensor's.
    """

    change: Change
    turned: bool
    experts: int
    expert: int | None
    first: int
    rows: int


@dataclass
class _Place:
    """What makes one tensor.

    base: the tensor of the base. saved: of the adapter, in its place. low: what is added. bias: what is added, scaled.
    rows: which of the adapter's are some rows.
    """

    base: str | None
    saved: str | None = None
    low: _Low | None = None
    bias: Change | None = None
    rows: Change | None = None


class MergedCheckpoint(DerivedCheckpoint):
    """All tensors of a base with an adapter's changes, in the base's dtypes; sums are of float32.

    content: the base's config.json, as it is then.

    Raises CheckpointError for an adapter of another base, and for a base that is quantized.
    """

    def __init__(self, base: Checkpoint, adapter: Adapter, config: Mapping[str, Any]) -> None:
        if (stored := stored_quantization(config)) is not None:
            raise CheckpointError(
                f"{base.folder}: is quantized ({stored.method}): merge into the model that it was made from, or, if "
                "the adapter was trained on it, --onto dequantized"
            )
        super().__init__(base)
        self._adapter, self._stored = adapter, base.tensors
        # Those of all experts are asked for by each of them in turn, and the others by each part of a tensor.
        self._factor = functools.lru_cache(4)(adapter.read)
        architecture, shape = parse_config(config)
        self._names, self._model_type = architecture.weights(shape), str(config.get("model_type"))
        self._own = {self._names.own(name): name for name in self.tensors}
        self._places: dict[str, _Place] = {}
        self._place(shape.tie_word_embeddings)
        self.content = self._settled(config)
        self.nbytes = sum(info.nbytes for info in self.tensors.values())
        adapter.warn_if_idle()

    def _read(self, info: TensorInfo, index: tuple[slice, ...] | None) -> Array:
        place = self._places.get(info.name)
        if place is None:
            return super()._read(info, index)
        parts = tuple(index or ()) + (slice(None),) * (len(info.shape) - len(index or ()))
        value = self._before(place, parts)
        if place.low is not None:
            value = self._lowered(place, place.low, value, parts)
        if place.bias is not None and place.bias.bias is not None:
            value = value + place.bias.scale * self._adapter.read(place.bias.bias)[parts[0]]
        if place.rows is not None and place.rows.rows is not None:
            at = {int(row): i for i, row in enumerate(np.arange(info.shape[0])[parts[0]])}
            there = [(at[token], i) for i, token in enumerate(place.rows.tokens) if token in at]
            if there:
                to, of = map(list, zip(*there, strict=True))
                value[to] = self._adapter.read(place.rows.rows)[of][:, parts[1]]
        return np.ascontiguousarray(value.astype(info.dtype))

    def _before(self, place: _Place, parts: tuple[slice, ...]) -> Array:
        if place.saved is not None:
            return self._adapter.read(place.saved, parts)
        assert place.base is not None
        return self.base.read(place.base, parts).astype(np.float32)

    def _lowered(self, place: _Place, low: _Low, value: Array, parts: tuple[slice, ...]) -> Array:
        """With what is added, and rows at their lengths."""
        change = low.change
        assert change.a is not None
        assert change.b is not None
        a, b = self._factor(change.a), self._factor(change.b)
        *first, rows, columns = (*parts[:-2], *parts[-2:][::-1]) if low.turned else parts
        rows_of = slice(low.first, low.first + low.rows)
        if low.experts:
            a, b = by_expert(a, b, low.experts)
            which = first[0] if low.expert is None else slice(low.expert, low.expert + 1)
            a, b = a[which], b[which]
        value = np.swapaxes(value, -1, -2) if low.turned else value
        added = change.scale * (b[..., rows_of, :][..., rows, :] @ a[..., columns])
        value = value + added.reshape(value.shape)
        if change.magnitude is not None:
            whole = self._before(place, (slice(None), rows) if low.turned else (rows, slice(None)))
            whole = (whole.T if low.turned else whole) + change.scale * (b[rows] @ a)
            value = (
                value
                * (self._adapter.read(change.magnitude).reshape(-1)[rows] / np.linalg.norm(whole, axis=1))[:, None]
            )
        return np.swapaxes(value, -1, -2) if low.turned else value

    def _place(self, tied: bool) -> None:
        adapter, missing, shapes = self._adapter, [], []
        for name, saved in adapter.saved.items():
            base = self._find(name)
            if base is None and not self._is_head(name, tied):
                missing.append(name)
                continue
            shape, ours = adapter.info(saved).shape, None if base is None else self._stored[base].shape
            grows = ours is not None and base in (self._find(self._names.embedding), self._find(self._names.head))
            if ours is not None and shape != ours and not (grows and len(shape) == 2 and shape[1:] == ours[1:]):
                shapes.append(f"{name} {list(ours)} by {list(shape)}")
                continue
            self._of(base or self._names.head, base, adapter.info(saved)).saved = saved
        for module, change in adapter.changes.items():
            for name, low in self._targets(module, change, tied):
                base = self._find(name)
                if base is None and not self._is_head(name, tied):
                    missing.append(name)
                    continue
                place = self._of(base or self._names.head, base or self._find(self._names.embedding))
                shape = self.tensors[base or self._names.head].shape
                if change.rows is not None:
                    place.rows = change
                    if (width := adapter.info(change.rows).shape[1:]) != shape[1:] or max(change.tokens) >= shape[0]:
                        shapes.append(f"{name} {list(shape)} by rows of {list(width)} up to {max(change.tokens)}")
                if change.a is not None:
                    place.low = self._fitting(low, shape)
                    if place.low is None:
                        shapes.append(self._shapes(name, change))
            if change.bias is not None:
                base = self._find(f"{module}.bias")
                if base is None:
                    missing.append(f"{module}.bias")
                elif (size := adapter.info(change.bias).shape) != self.tensors[base].shape:
                    shapes.append(f"{module}.bias {list(self.tensors[base].shape)} by {list(size)}")
                else:
                    self._of(base, base).bias = change
        problems = [
            f"{what}: {some(dict.fromkeys(names))}"
            for what, names in (("changes what the base has not", missing), ("other shapes", shapes))
            if names
        ]
        if problems:
            raise CheckpointError(f"{adapter.folder}: is not an adapter of {self.folder}: {'; '.join(problems)}")
        self._untie(tied)

    def _untie(self, tied: bool) -> None:
        """Where a tied embedding changes and the head does not, the head stays what it was; rows change in both."""
        embedding, head = self._find(self._names.embedding), self._find(self._names.head)
        place = self._places.get(embedding or "")
        if (
            not tied
            or place is None
            or embedding is None
            or self._adapter.config.ties
            or self._places.get(head or self._names.head)
        ):
            return
        if place.low is not None or place.saved is not None:
            added = self._of(head or self._names.head, embedding)
            added.rows = place.rows
        elif head is not None:
            self._of(head, head).rows = place.rows

    def _targets(self, module: str, change: Change, tied: bool) -> Iterator[tuple[str, _Low]]:
        """Tensors that a module's change is of, and which part of it."""
        low = _Low(change, False, 0, None, 0, 0)
        if self._find(f"{module}.weight") is not None or self._is_head(f"{module}.weight", tied):
            yield f"{module}.weight", low
        elif self._find(module) is not None:
            yield module, low
        else:
            parent, _, name = module.rpartition(".")
            known = APART.get(name, ())
            apart = next((parts for parts in known if self._find(f"{parent}.0.{parts[0]}.weight")), ())
            if not apart:
                yield f"{module}.weight", low
            first, experts = 0, 0
            while apart and self._find(f"{parent}.{experts}.{apart[0]}.weight"):
                experts += 1
            for part in apart:
                bases = [self._find(f"{parent}.{expert}.{part}.weight") for expert in range(experts)]
                rows = [self._stored[base].shape[0] if base else 0 for base in bases]
                for expert in range(experts):
                    yield f"{parent}.{expert}.{part}.weight", _Low(change, False, experts, expert, first, rows[expert])
                first += rows[0]

    def _fitting(self, low: _Low, shape: Shape) -> _Low | None:
        """With what a tensor's shape says; None: it is of another."""
        change, info = low.change, self._adapter.info
        assert change.a is not None
        assert change.b is not None
        (ranks, columns), (rows, _) = info(change.a).shape, info(change.b).shape
        if change.magnitude is not None and (len(shape) != 2 or math.prod(info(change.magnitude).shape) != rows):
            return None
        if low.expert is not None:
            return low if shape == (low.rows, columns) and low.first + low.rows <= rows else None
        if len(shape) == 3:
            if ranks % shape[0]:
                return None
            low = dataclasses.replace(low, experts=shape[0])
        turned = shape[-2:] == (columns, rows)
        if rows == columns:
            turned = self._model_type == TURNED.get(len(shape))
        turned = turned or change.is_embedding
        if shape[-2:] != ((columns, rows) if turned else (rows, columns)):
            return None
        return dataclasses.replace(low, turned=turned, rows=rows)

    def _shapes(self, name: str, change: Change) -> str:
        info = self._adapter.info
        assert change.a is not None
        assert change.b is not None
        base = self._find(name) or self._names.head
        factors = f"{list(info(change.b).shape)} and {list(info(change.a).shape)}"
        lengths = "" if change.magnitude is None else f" with magnitudes {list(info(change.magnitude).shape)}"
        return f"{name} {list(self.tensors[base].shape)} by {factors}{lengths}"

    def _find(self, name: str) -> str | None:
        """The base's tensor of a name of transformers."""
        for spelling in (name, spelled(name, OTHER_NAMES)):
            found = spelling if spelling in self._stored else self._own.get(self._names.own(spelling))
            if found is not None:
                return found
        return None

    def _is_head(self, name: str, tied: bool) -> bool:
        return tied and self._names.own(name) == self._names.head

    def _of(self, name: str, base: str | None, info: TensorInfo | None = None) -> _Place:
        """The place of a tensor, which is there from then on. info: as it is then."""
        if name not in self._places:
            self._places[name] = _Place(base)
            like = self._stored.get(name) or (self._stored[base] if base is not None else info)
            assert like is not None
            shape = like.shape if info is None else info.shape
            self.tensors[name] = dataclasses.replace(like, name=name, shape=shape)
        return self._places[name]

    def _settled(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Of as many tokens as the embedding has rows."""
        embedding = self._find(self._names.embedding)
        if embedding is None or self.tensors[embedding].shape == self._stored[embedding].shape:
            return dict(config)
        size = {"vocab_size": self.tensors[embedding].shape[0]}
        inner = config.get(TEXT)
        text = {TEXT: {**inner, **size}} if isinstance(inner, Mapping) and "vocab_size" in inner else {}
        return {**config, **size, **text}
