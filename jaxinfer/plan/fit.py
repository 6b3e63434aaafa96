"""What weights and cache take of each chip's memory, from shapes: no compiler and no devices are needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Unpack

from jaxinfer.engine.config import EngineConfig, check_options, in_our_words
from jaxinfer.engine.dtypes import choose_dtype
from jaxinfer.engine.load import limits, sized_programs
from jaxinfer.engine.loading import choose_placement, open_adapters, settle_changes
from jaxinfer.engine.programs import (
    AdapterLimits,
    Programs,
    cache_layout,
    placed_adapters,
    placed_decode_state,
    placed_hidden,
    placed_params,
    reach,
)
from jaxinfer.engine.sizing import RESERVE, Sizes, default_length, device_bytes, longest, page_size
from jaxinfer.models.model import AbstractModel
from jaxinfer.plan.slices import GIB, Device, Slice
from jaxinfer.quantization.schemes import Quantization
from jaxinfer.sharding import FSDP, GATHERED, TENSOR, axis_size, describe, tensor_sizes


class DoesNotFit(ValueError):
    """Weights and a cache for the longest sequence, or what steps compute, are more than a chip has."""


@dataclass(frozen=True)
class Fit:
    """A model on a slice. Bytes are each chip's.

    target: the slice.
    programs: an engine's there.
    sizes: of the cache.
    weights: their bytes.
    slots, hidden: bytes of the sequences' decode state, and of hidden states. adapters: bytes of room for them.
    """

    target: Slice
    programs: Programs
    sizes: Sizes
    weights: int
    slots: int
    hidden: int
    adapters: int

    @property
    def model(self) -> AbstractModel:
        return self.programs.model

    @property
    def mesh(self) -> str:
        """As a spec."""
        return describe(self.programs.mesh) if self.programs.mesh is not None else "tensor=1"

    @property
    def tensor(self) -> int:
        return axis_size(self.programs.mesh, TENSOR)

    @property
    def fsdp(self) -> int:
        return axis_size(self.programs.mesh, (FSDP,))

    @property
    def gathered(self) -> int:
        """How many shards of rows share experts, where there are some."""
        return axis_size(self.programs.mesh, GATHERED)

    @property
    def shards(self) -> int:
        """Of rows."""
        return self.programs.shards

    @property
    def devices(self) -> int:
        """That are used."""
        return self.tensor * self.shards

    @property
    def max_num_seqs(self) -> int:
        return self.programs.max_rows * self.shards

    @property
    def max_num_batched_tokens(self) -> int:
        return self.programs.max_tokens * self.shards

    @property
    def cache_tokens(self) -> int:
        """Of context, for which there is room in sequences of the longest kind."""
        return self.programs.cache_tokens

    def rows_of(self, context: int) -> int:
        """How many sequences of `context` tokens there is room for in the cache."""
        return self.programs.capacity(context) // context

    @property
    def held(self) -> int:
        """What is there all the time."""
        return self.weights + self.slots + self.hidden + self.adapters + self.sizes.bytes


def model_of(
    config: Mapping[str, Any],
    dtype: str = "auto",
    target: Slice | None = None,
    quantization: Quantization | None = None,
    max_model_len: int | None = None,
) -> AbstractModel:
    """The model of a config.json's content. "auto": what an engine takes there, on a TPU if no place is given, for
    weights in the dtype that it says, else in bfloat16. max_model_len: see `ModelConfig.for_length`."""
    device = target.devices[0] if target else Device(0, "tpu")
    kept = choose_dtype(dtype, config, None, device)
    return AbstractModel.from_config(config, kept, quantization, max_model_len=max_model_len)


def fit_config(config: Mapping[str, Any], target: Slice, **options: Unpack[EngineConfig]) -> Fit:
    """`fit` of a config.json's content. dtype "auto": see `model_of`."""
    options = in_our_words(options)
    asked = options.get("quantization"), options.get("max_model_len")
    return fit(model_of(config, options.get("dtype", "auto"), target, *asked), target, **options)


def fit(model: AbstractModel, target: Slice, **options: Unpack[EngineConfig]) -> Fit:
    """What an LLM with these options holds there. Raises DoesNotFit, with what would fit."""
    options, settings = in_our_words(options), check_options(options)
    adapters = open_adapters(settings)
    settle_changes(settings, adapters.values(), model)
    shape = model.config
    placement = choose_placement(shape, target.devices, settings["mesh"])
    rows, tokens = limits(settings, placement)
    weights = device_bytes(placed_params(model, placement))
    slots = device_bytes(placed_decode_state(model, placement, rows))
    hidden = device_bytes(placed_hidden(model, placement, tokens))
    beside = device_bytes(placed_adapters(model, placement, AdapterLimits.of(settings)))
    held = weights + slots + hidden + beside
    available = int(target.chip.memory * (settings["memory_utilization"] - RESERVE)) - held
    layout = cache_layout(model, placement, settings["attention"], settings["kv_cache_dtype"])
    length = settings["max_model_len"] or default_length(layout, placement, rows, shape.max_context)
    size = page_size(settings["page_size"], placement, rows, length, layout.chunk)
    cache = size, reach(tokens), rows
    wanted, most = settings["kv_cache_memory"], max(target.chip.memory - held, 0)
    if wanted is not None and wanted > most:
        raise DoesNotFit(
            f"{target.name}: kv_cache_memory is {wanted:,}, and beside weights a chip has {most:,} bytes: lower it, "
            "or leave it out"
        )
    try:
        programs, sizes = sized_programs(model, placement, settings, max(wanted or available, 0))
    except ValueError as error:
        if (settings["max_model_len"] or 0) > shape.max_context:
            raise
        length = settings["max_model_len"] or size
        needed, most = held + layout.least(length, *cache), longest(layout, *cache, length, available)
        raise DoesNotFit(
            f"{target.name}: needs {needed / GIB:.2f} GiB of a chip's {target.chip.memory / GIB:.2f}, of which "
            f"{(available + held) / GIB:.2f} are for weights and cache: "
            + (_remedies(model, target, axis_size(placement, TENSOR), most, options) or str(error))
        ) from None
    return Fit(target, programs, sizes, weights, slots, hidden, beside)


def _remedies(model: AbstractModel, target: Slice, tensor: int, room: int, options: EngineConfig) -> str:
    """What would fit: more chips, half the bytes, shorter sequences."""
    remedies = []
    shape, dtype = model.config, model.dtype
    for n in tensor_sizes(shape.split_heads, shape.num_kv_heads, 256):
        if n > tensor:
            try:
                fit(model, target.with_devices(n), **options | {"mesh": f"tensor={n}"})
            except DoesNotFit:
                continue
            remedies.append(f"tensor={n}")
            break
    if dtype.itemsize == 4:
        remedies.append("dtype bfloat16")
    if room > 0:
        remedies.append(f"max_model_len ≤ {room}")
    return " or ".join(remedies)
