"""Layer after layer, each with whole weights while its turn lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxinfer.attention import ForwardBatch
from jaxinfer.cache import Cache, LayerCache
from jaxinfer.sharding import FSDP, TENSOR, axis_size, fsdp_axis, on_axes, on_tensor, split_tokens, whole_tokens

M = TypeVar("M", bound=nnx.Module)
Stream = Any  # what goes from layer to layer: hidden states `[T, D]`, or a tuple that begins with them
# Of a layer on that, with its own cache and its group's view of the batch.
RunLayer = Callable[[M, Stream, LayerCache | None, ForwardBatch], tuple[Stream, LayerCache | None]]


def hidden_states(stream: Stream) -> jax.Array:
    """The hidden states in it."""
    return cast(jax.Array, stream[0] if isinstance(stream, tuple) else stream)


def _with_hidden(stream: Stream, call: Callable[[jax.Array], jax.Array]) -> Stream:
    (hidden, *more), tree = jax.tree.flatten(stream)
    return jax.tree.unflatten(tree, [call(hidden), *more])


def stack(
    layers: Iterable[M], x: Stream, cache: Cache | None, batch: ForwardBatch, run: RunLayer[M]
) -> tuple[Stream, Cache | None]:
    """What comes out of the last of all layers, and the cache with their new keys and values."""
    assert cache is None or batch.layers is not None, "a batch over a cache says which layer has which part of it"
    arrays: list[LayerCache | None] = list(cache or ())
    views = batch.views()
    places = batch.layers.places if batch.layers is not None and cache is not None else ()
    x = _with_hidden(x, split_tokens)
    before = hidden_states(x)
    for i, layer in enumerate(layers):
        whole = gathered(layer, before, batch.mesh)
        before = hidden_states(x)
        if not places or (location := places[i]) is None:
            x, _ = run(whole, x, None, batch)
        else:
            own, group = location
            x, arrays[own] = run(whole, x, arrays[own], views[group])
    return _with_hidden(x, whole_tokens), None if cache is None else cast(Cache, tuple(arrays))


def gathered(layer: M, before: jax.Array, mesh: Mesh | None) -> M:
    """The layer with its weights put together from all devices of the `fsdp` axis. Source: ZeRO stage 3 (Rajbhandari et
    al., arXiv:1910.02054).

    That begins when `before`, the input of the layer before, is there, and so there are never more than two layers'
    weights. A zero that is made of it and added ties the two: XLA drops optimization barriers before it orders what is
    left, and would gather all layers at once.
    """
    if axis_size(mesh, (FSDP,)) == 1:
        return layer
    graph, state = nnx.split(layer)
    flat = nnx.to_flat_state(state)
    axes = [names for _, variable in flat for names in _axes(variable)]
    bits = lax.bitcast_convert_type(before[0, 0].astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)
    zero = lax.shift_right_logical(bits, jnp.uint32(16))

    def gather(parts: list[jax.Array], zero: jax.Array) -> list[jax.Array]:
        split = [fsdp_axis(names) for names in axes]
        return [
            part if axis is None else lax.all_gather(part + zero.astype(part.dtype), FSDP, axis=axis, tiled=True)
            for part, axis in zip(parts, split, strict=True)
        ]

    # Each tensor device its own part, which is not left to XLA: that would put those parts together first.
    tensor = [on_axes(names, TENSOR) for names in axes]
    parts, tree = jax.tree.flatten([variable.get_value() for _, variable in flat])
    whole = jax.tree.unflatten(tree, on_tensor(gather, (tensor, PartitionSpec()), tensor)(parts, zero))
    merged = [(path, variable.replace(value)) for (path, variable), value in zip(flat, whole, strict=True)]
    return nnx.merge(graph, nnx.from_flat_state(merged))


def _axes(variable: Any) -> list[tuple[str | None, ...]]:
    """The logical axes of a weight's arrays."""
    about = variable.get_metadata()
    return variable.get_value().array_axes if "is_embedding" in about else [about["axes"]]  # a weight, or one array
