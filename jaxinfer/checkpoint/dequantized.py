"""A checkpoint as quantization leaves it: what an adapter was trained on whose base was quantized.

Source: QLoRA (Dettmers et al., arXiv:2305.14314).
"""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from jaxinfer.checkpoint.folder import Checkpoint, DerivedCheckpoint
from jaxinfer.checkpoint.load import FloatWeights
from jaxinfer.checkpoint.memory import Host
from jaxinfer.checkpoint.tensors import TensorInfo
from jaxinfer.errors import CheckpointError
from jaxinfer.models.model import AbstractModel
from jaxinfer.models.sources import Region, slices, whole
from jaxinfer.quantization.schemes import Quantization
from jaxinfer.quantization.stored import QUANTIZATION_FIELDS, stored_quantization


class DequantizedCheckpoint(DerivedCheckpoint):
    """The tensors that a checkpoint in floats has; those that are quantized have what they stand for, in this dtype. A
    whole weight at a time is read for them.

    content: the base's config.json, as it is then.
    method: how the base is quantized; what it is to be quantized by, if it is not.

    Raises CheckpointError for a base that is quantized already, if it is to be, and for one that is not, if not.
    """

    def __init__(
        self, base: Checkpoint, config: Mapping[str, Any], dtype: DTypeLike, quantization: Quantization | None = None
    ) -> None:
        stored = stored_quantization(config)
        if stored is None and quantization is None:
            raise CheckpointError(
                f"{base.folder}: is not quantized: --base-quantization nf4 or another scheme says by what it was when "
                "the adapter was trained; without --onto dequantized it is taken as it is"
            )
        if stored is not None and quantization is not None:
            raise CheckpointError(
                f"{base.folder}: is quantized ({stored.method}) already: leave --base-quantization out"
            )
        super().__init__(base)
        self.method = str(quantization) if stored is None else stored.method
        self.content = {name: value for name, value in config.items() if name not in QUANTIZATION_FIELDS}
        model, plain = (
            AbstractModel.from_config(config, dtype, quantization),
            AbstractModel.from_config(self.content, dtype),
        )
        weights = FloatWeights(model, base)
        changed = {name for name, spec in model.params.items() if spec.scheme is not None or spec.stored is not None}
        # The weights that each tensor has parts of, and where.
        places: dict[str, list[tuple[str, Region]]] = defaultdict(list)
        shapes: dict[str, tuple[int, ...]] = {}
        for name, spec in plain.params.items():
            shapes |= spec.source.tensors(spec.shape)
            for region in spec.source.regions(whole(spec.shape)):
                places[region.tensor].append((name, region))
        self._places = {tensor: parts for tensor, parts in places.items() if any(name in changed for name, _ in parts)}
        made_of = {one for parts in self._places.values() for name, _ in parts for one in weights.tensors(name)}
        like = next(iter(base.tensors.values()))
        self.tensors = {name: info for name, info in base.tensors.items() if name not in made_of} | {
            name: dataclasses.replace(like, name=name, dtype=np.dtype(dtype), shape=shapes[name])
            for name in self._places
        }
        self.nbytes = sum(info.nbytes for info in self.tensors.values())
        self._weight = functools.lru_cache(1)(weights.read)
        self._made = functools.lru_cache(1)(self._tensor)

    def _read(self, info: TensorInfo, index: tuple[slice, ...] | None) -> Host:
        return self._made(info.name)[index or ()] if info.name in self._places else super()._read(info, index)

    def _tensor(self, name: str) -> Host:
        info = self.tensors[name]
        tensor = np.empty(info.shape, info.dtype)
        for weight, region in self._places[name]:
            tensor[slices(region.stored)] = region.turned(self._weight(weight)[region.index])
        return tensor
