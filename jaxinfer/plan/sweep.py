"""Every slice and every mesh on it, from shapes: which are worth a plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Unpack

from jaxinfer.engine.config import EngineConfig
from jaxinfer.models.model import AbstractModel
from jaxinfer.plan.figures import decoding
from jaxinfer.plan.fit import DoesNotFit, Fit, fit
from jaxinfer.plan.slices import GENERATIONS, Slice
from jaxinfer.plan.targets import GPUS, find_target
from jaxinfer.sharding import AXES, tensor_sizes

MOST = 64  # devices of a slice


@dataclass(frozen=True)
class Candidate:
    """A slice and a mesh that fit.

    fit: the model on them.
    rows: how many sequences run at once there.
    bound: of a step of them, as `decoding` has it.
    """

    fit: Fit
    rows: int
    bound: dict[str, Any]

    @property
    def rate(self) -> float:
        """Tokens a second a chip, at most."""
        return float(self.bound["tokens_per_second_per_chip"])


def places() -> list[str]:
    """All that are tried where nobody says which."""
    slices = [
        f"{name}-{chips * generation.per_chip}"
        for name, generation in GENERATIONS.items()
        for chips in generation.shapes
        if chips * generation.devices <= MOST
    ]
    return [*slices, *(f"{gpu}-{count}" for gpu in GPUS for count in (1, 2, 4, 8))]


def meshes(model: AbstractModel, target: Slice) -> Iterator[str]:
    """The specs that use all devices of a slice: `tensor`, and what is left over another axis."""
    devices = len(target.devices)
    for tensor in tensor_sizes(model.config.split_heads, model.config.num_kv_heads, devices):
        rest = devices // tensor
        if rest == 1 and devices == tensor:
            yield f"tensor={tensor}"
        elif rest * tensor == devices:
            width = model.config.hidden_size  # which fsdp splits
            others = [axis for axis in AXES if axis == "data" or (axis == "fsdp" and width % rest == 0)]
            yield from (f"{axis}={rest},tensor={tensor}" for axis in others)


def sweep(
    model: AbstractModel, topologies: list[str], context: int, **options: Unpack[EngineConfig]
) -> tuple[list[Candidate], int]:
    """What fits, the fastest first, and how many meshes do not. As many sequences run at once as there is room for, and
    max_num_seqs allows."""
    candidates, refused = [], 0
    for name in topologies:
        target = find_target(name, compiles=False)
        for mesh in meshes(model, target):
            try:
                held = fit(model, target, **options | {"mesh": mesh})
            except DoesNotFit:
                refused += 1
                continue
            rows = min(held.max_num_seqs, held.rows_of(context))
            if rows:
                candidates.append(Candidate(held, rows, decoding(held, rows, context)))
            else:
                refused += 1
    return sorted(candidates, key=lambda candidate: -candidate.rate), refused
