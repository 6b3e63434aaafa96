"""Short causal convolutions over the flat stream, each channel by itself."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxinfer.attention import ForwardBatch
from jaxinfer.kernels.cpu import Recurred, Rows, convolution
from jaxinfer.layers.recurrence import begins, row_slots


class Convolution(nnx.Module):
    """The parameters of one, as torch's Conv1d has them: weight `[channels, 1, width]`, bias `[channels]`."""

    def __init__(self, channels: int, width: int, *, bias: bool, dtype: DTypeLike):
        self.weight = nnx.Param(jnp.ones((channels, 1, width), dtype), axes=(None, None, None))
        self.bias = nnx.Param(jnp.zeros(channels, dtype), axes=(None,)) if bias else None


def causal_convolution(
    x: jax.Array, weight: jax.Array, bias: jax.Array | None, states: jax.Array | None, batch: ForwardBatch
) -> tuple[jax.Array, jax.Array | None]:
    """`y_t = b + sum_j w_j x_(t - width + 1 + j)` over each row's own tokens.

    x `[T, *channels]`, weight `[*channels, width]`, bias `[*channels]`. states: of each row its last inputs, float32
    `[slots, width - 1, *channels]`; None: rows are whole sequences. Returns y in float32 and the new states.
    """
    past = jnp.zeros((batch.kv_lens.shape[0], weight.shape[-1] - 1, *x.shape[1:]), jnp.float32)
    if states is None:
        return _by_xla(x, weight, bias, past, batch)[0], None
    slots = row_slots(batch, states.shape[0])

    def by_xla() -> Recurred:
        fresh = begins(batch).reshape(-1, *(1,) * x.ndim)
        y, last = _by_xla(x, weight, bias, jnp.where(fresh, past, states[slots]), batch)
        return y, states.at[slots].set(last)

    return convolution(x, weight, bias, states, Rows(batch.cu_q_lens, batch.kv_lens, slots), by_xla)


def _by_xla(
    x: jax.Array, weight: jax.Array, bias: jax.Array | None, past: jax.Array, batch: ForwardBatch
) -> tuple[jax.Array, jax.Array]:
    """y, and each row's last inputs after those in `past [R, width - 1, *channels]`."""
    width = weight.shape[-1]
    weight, x = jnp.moveaxis(weight, -1, 0).astype(jnp.float32), x.astype(jnp.float32)
    if batch.decode_only:
        seen = jnp.concatenate([past, x[:, None]], axis=1)
        y, last = jnp.sum(seen * weight, axis=1), seen[:, 1:]
    else:
        y = _within(x, weight, batch)
        lengths, starts = jnp.diff(batch.cu_q_lens), batch.cu_q_lens[:-1]
        place = jnp.arange(width - 1, dtype=jnp.int32)
        # A row's first tokens see what it had before.
        early = [jnp.sum(past[:, i:] * weight[: width - 1 - i], axis=1) for i in range(width - 1)]
        at = jnp.where(place < lengths[:, None], starts[:, None] + place, x.shape[0])
        y = y.at[at].add(jnp.stack(early, axis=1), mode="drop")
        from_end = lengths[:, None] - (width - 1) + place
        rest = jnp.minimum(lengths[:, None] + place, width - 2)
        older = jnp.take_along_axis(past, rest.reshape(*rest.shape, *(1,) * (x.ndim - 1)), axis=1)
        newer = x.at[starts[:, None] + from_end].get(mode="clip")
        last = jnp.where((from_end >= 0).reshape(*rest.shape, *(1,) * (x.ndim - 1)), newer, older)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y, last


def _within(x: jax.Array, weight: jax.Array, batch: ForwardBatch) -> jax.Array:
    """Of this batch's tokens alone. weight: `[width, *channels]`."""
    offset = jnp.arange(x.shape[0], dtype=jnp.int32) - batch.cu_q_lens[batch.segment_ids]
    y = x * weight[-1]
    for back in range(1, weight.shape[0]):
        shifted = jnp.pad(x, ((back, 0), *((0, 0),) * (x.ndim - 1)))[: x.shape[0]]
        own = (offset >= back).reshape(-1, *(1,) * (x.ndim - 1))
        y = y + jnp.where(own, shifted, 0) * weight[-1 - back]
    return y
