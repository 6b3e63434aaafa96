"""What adapters beside a model's weights may be, and the arrays that they are kept in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from jaxinfer.models.model import AbstractModel
from jaxinfer.models.params import ParamSpec
from jaxinfer.sharding import padded, partition
from jaxinfer.weights import Axes, LowRank


@dataclass(frozen=True)
class AdapterLimits:
    """What adapters may be; see EngineConfig.

    slots: how many the rows of a call may have.
    rank: their largest.
    vocabulary, experts: they may change the table and the head, and experts.
    """

    slots: int = 0
    rank: int = 0
    vocabulary: bool = False
    experts: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """The same as options of `LLM`."""
        if not self.slots:
            return dict.fromkeys(("max_adapters", "max_lora_rank", "adapted_vocabulary", "adapted_experts"))
        sizes = {"max_adapters": self.slots, "max_lora_rank": self.rank}
        return {**sizes, "adapted_vocabulary": self.vocabulary, "adapted_experts": self.experts}

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> AdapterLimits:
        """As options say."""
        slots, rank = options["max_adapters"] or 0, options["max_lora_rank"] or 0
        return cls(slots, rank, bool(options["adapted_vocabulary"]), bool(options["adapted_experts"]))


NO_ADAPTERS = AdapterLimits()


def one_adapter(model: AbstractModel, placement: jax.Device | Mesh, limits: AdapterLimits) -> dict[str, LowRank]:
    """What one adapter does to each weight, abstractly, as that is padded there."""

    def of(name: str, spec: ParamSpec) -> LowRank:
        shape, rank = spec.shape, limits.rank
        if isinstance(placement, Mesh):
            shape = padded(shape, spec.axes, placement, spec.multiples or (1,) * len(shape))
        *experts, rows, columns = shape
        is_table = name == model.vocabulary[0]
        sizes = ((rows, rank), (rank, columns)) if is_table else ((rank, columns), (rank, rows))
        a, b = (jax.ShapeDtypeStruct((*experts, *size), model.weight_dtype) for size in sizes)
        if experts:
            return LowRank(a, b)  # type: ignore[arg-type]
        vector = jax.ShapeDtypeStruct((columns if is_table else rows,), np.float32)
        return LowRank(a, b, vector, vector)  # type: ignore[arg-type]

    left = () if limits.vocabulary else model.vocabulary
    return {
        name: of(name, spec)
        for name, spec in model.adaptable.items()
        if name not in left and (limits.experts or len(spec.shape) == 2)
    }


def adapter_axes(model: AbstractModel, name: str) -> LowRank:
    """The logical axes of slots for what adapters do to a weight."""
    return LowRank.axes(None if name == model.vocabulary[0] else model.adaptable[name].axes)


def placed_adapters(model: AbstractModel, placement: jax.Device | Mesh, limits: AdapterLimits) -> dict[str, LowRank]:
    """Slots for adapters, by the names of the weights that they change."""

    def place(one: jax.ShapeDtypeStruct, axes: Axes) -> jax.ShapeDtypeStruct:
        experts = one.shape[:1] if len(axes) > 3 else ()
        shape = *experts, limits.slots, *one.shape[len(experts) :]
        on_mesh = isinstance(placement, Mesh)
        sharding = NamedSharding(placement, partition(axes)) if on_mesh else SingleDeviceSharding(placement)
        return jax.ShapeDtypeStruct(shape, one.dtype, sharding=sharding)

    ones = one_adapter(model, placement, limits) if limits.slots else {}
    return {name: jax.tree.map(place, one, adapter_axes(model, name)) for name, one in ones.items()}
