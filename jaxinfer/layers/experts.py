"""Feed-forward blocks of which each token takes some: mixtures of experts (Shazeer et al., arXiv:1701.06538).

Experts are stacked, `[E, out, in]`, and split over all devices. Each gets the tokens of all shards of rows, and does
those of its own experts; what they make is summed, as an MLP's halves are, and goes back to the shard that the token is
from. No token is ever dropped, padding goes to no expert.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from jaxinfer.layers.linear import Linear, parameter
from jaxinfer.layers.mlp import ACTIVATIONS, GatedMLP
from jaxinfer.layers.router import Router, Routing
from jaxinfer.sharding import GATHERED, TENSOR, on_tensor
from jaxinfer.weights import Weight, grouped_dots
from jaxinfer.weights.products import on_each_already


class StackedLinear(nnx.Module):
    """The weights of linears that are alike, `[E, out, in]`."""

    def __init__(self, experts: int, in_features: int, out_features: int, **options: Any):
        self.weight = parameter((experts, out_features, in_features), ("experts", None, None), **options)


class Experts(nnx.Module):
    """Gated MLPs, see GatedMLP."""

    def __init__(self, features: int, hidden: int, *, experts: int, activation: str, dtype: DTypeLike, rngs: nnx.Rngs):
        self.gate_proj = StackedLinear(experts, features, hidden, dtype=dtype, rngs=rngs)
        self.up_proj = StackedLinear(experts, features, hidden, dtype=dtype, rngs=rngs)
        self.down_proj = StackedLinear(experts, hidden, features, dtype=dtype, rngs=rngs)
        self.activation = activation

    def __call__(
        self, x: jax.Array, experts: jax.Array, shares: jax.Array, live: jax.Array, beside: jax.Array | None = None
    ) -> jax.Array:
        """Of each token `x [T, D]` the sum of its experts i32[T, k], each times its share f32[T, k], in float32; zeros
        where a token is not live, bool[T]. beside: parts that are summed together with them, see `dot_parts`."""
        weights = tuple(linear.weight.get_value() for linear in (self.gate_proj, self.up_proj, self.down_proj))
        experts = jnp.where(live[:, None], experts, -1)
        if on_each_already():
            out = self._own(x, experts, shares, weights)
            return out if beside is None else out + beside[0]

        def part(x: jax.Array, chosen: jax.Array, weights: tuple[Weight, ...], beside: jax.Array | None) -> jax.Array:
            shared = lax.axis_size(GATHERED) > 1
            if shared:
                x, chosen = (
                    lax.all_gather(x, GATHERED, tiled=True),
                    lax.all_gather(chosen, GATHERED, axis=1, tiled=True),
                )
            experts, shares = chosen[0], lax.bitcast_convert_type(chosen[1], jnp.float32)
            first = lax.axis_index((*GATHERED, *TENSOR)) * weights[0].shape[0]
            out = self._own(x, experts - first, shares, weights)
            if shared:
                out = lax.psum_scatter(out.astype(x.dtype), GATHERED, tiled=True).astype(jnp.float32)
            return lax.psum(out if beside is None else out + beside[0], TENSOR)

        whole, own = PartitionSpec(), PartitionSpec(TENSOR)
        chosen = jnp.stack([experts, lax.bitcast_convert_type(shares, experts.dtype)])  # to be gathered as one
        return on_tensor(part, (whole, whole, own, own), whole)(x, chosen, weights, beside)

    def _own(self, x: jax.Array, experts: jax.Array, shares: jax.Array, weights: tuple[Weight, ...]) -> jax.Array:
        """The part of the experts that are here, the first of which is number 0."""
        gate, up, down = weights
        count, top_k = gate.shape[0], experts.shape[1]
        owner = jnp.where((experts >= 0) & (experts < count), experts, count).reshape(-1)
        order = jnp.argsort(owner)  # stable: what a token gets does not depend on chance
        sizes = jnp.bincount(owner, length=count + 1)[:count].astype(jnp.int32)
        rows = x[order // top_k]
        gated, raised = grouped_dots(rows, sizes, [gate, up])
        (outs,) = grouped_dots(ACTIVATIONS[self.activation](gated) * raised, sizes, [down], "float32")
        outs = outs * shares.reshape(-1)[order][:, None]
        place = jnp.zeros_like(order).at[order].set(jnp.arange(len(order), dtype=order.dtype))
        return jnp.sum(outs[place].reshape(len(x), top_k, -1), axis=1)


class SparseMLP(nnx.Module):
    """A router and its experts, and perhaps an MLP that all tokens take, times a gate of its own."""

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        routing: Routing,
        activation: str,
        shared: int = 0,
        shared_gate: bool = False,
        shared_bias: bool = False,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        """shared: the width of the MLP that all take; 0: there is none. shared_bias: its linears have one."""
        self.gate = Router(features, routing, dtype=dtype, rngs=rngs)
        self.experts = Experts(features, hidden, experts=routing.experts, activation=activation, dtype=dtype, rngs=rngs)
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.shared_expert = (
            GatedMLP(features, shared, activation=activation, bias=shared_bias, **options) if shared else None
        )
        self.shared_expert_gate = Linear(features, 1, axes=(None, "embed"), **options) if shared_gate else None

    def __call__(self, x: jax.Array, live: jax.Array) -> jax.Array:
        experts, shares = self.gate(x)
        if self.shared_expert is None:
            return self.experts(x, experts, shares, live).astype(x.dtype)
        # Its sum over devices is that of the experts.
        down = self.shared_expert.down_proj
        gate = jnp.ones((), "float32")
        if self.shared_expert_gate is not None:
            gate = jax.nn.sigmoid(self.shared_expert_gate(x).astype(jnp.float32))
        beside = down.parts(self.shared_expert.hidden(x)) * gate
        out = self.experts(x, experts, shares, live, beside)
        if down.bias is not None:
            out = out + down.bias.get_value().astype(jnp.float32) * gate
        return out.astype(x.dtype)
