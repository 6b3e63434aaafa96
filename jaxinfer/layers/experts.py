"""Feed-forward blocks of which each token takes some: mixtures of experts (Shazeer et al., arXiv:1701.06538).

Experts are stacked, `[E, out, in]`, and split over all devices. Each gets the tokens of all shards of rows, and does
those of its own experts; what they make is summed, as an MLP's halves are, and goes back to the shard that the token is
from. No token is ever dropped, padding goes to no expert.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from jaxinfer.kernels.tpu import mixture_of_experts
from jaxinfer.layers.linear import Linear, parameter
from jaxinfer.layers.mlp import GatedMLP, Gating
from jaxinfer.layers.router import Router, Routing
from jaxinfer.sharding import GATHERED, TENSOR, on_tensor
from jaxinfer.weights import Adapted, Weight, grouped_dots
from jaxinfer.weights.products import on_each_already

Gated = Callable[..., jax.Array]  # of a gate and what it opens for; or of that alone, where there are no gates
Weights = tuple[Weight, ...]
Biases = tuple[jax.Array, ...]


class StackedLinear(nnx.Module):
    """Linears that are alike: weights `[E, out, in]`, and perhaps biases `[E, out]`."""

    def __init__(
        self, experts: int, in_features: int, out_features: int, *, bias: bool, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.weight = parameter((experts, out_features, in_features), ("experts", None, None), dtype, rngs)
        self.bias = nnx.Param(jnp.zeros((experts, out_features), dtype), axes=("experts", None)) if bias else None

    def observe(self, x: jax.Array, sizes: jax.Array) -> None:
        """Is told what it multiplies, see `grouped_dots`: for those who want to know."""


class Experts(nnx.Module):
    """MLPs, gated or not, see GatedMLP."""

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        routing: Routing,
        gating: Gated,
        bias: bool = False,
        gated: bool = True,
        **options: Any,
    ):
        options |= {"bias": bias}
        self.gate_proj = StackedLinear(routing.experts, features, hidden, **options) if gated else None
        self.up_proj = StackedLinear(routing.experts, features, hidden, **options)
        self.down_proj = StackedLinear(routing.experts, hidden, features, **options)
        self.gating, self.of_inputs, self.total = gating, routing.of_inputs, routing.experts

    def __call__(
        self, x: jax.Array, experts: jax.Array, shares: jax.Array, live: jax.Array, beside: jax.Array | None = None
    ) -> jax.Array:
        """Of each token `x [T, D]` the sum of its experts i32[T, k], each times its share f32[T, k], or of the token
        times it, in float32; zeros where a token is not live, bool[T]. beside: parts that are summed together with
        them, see `dot_parts`."""
        linears = self._linears
        weights = tuple(linear.weight.get_value() for linear in linears)
        slot = next((weight.slot for weight in weights if isinstance(weight, Adapted)), None)
        biases = tuple(linear.bias.get_value() for linear in linears if linear.bias is not None)
        experts = jnp.where(live[:, None], experts, -1)
        if on_each_already():
            out = self._own(x, experts, shares, weights, biases, slot)
            return out if beside is None else out + beside[0]

        def part(
            x: jax.Array, chosen: jax.Array, weights: Weights, biases: Biases, beside: jax.Array | None
        ) -> jax.Array:
            shared = lax.axis_size(GATHERED) > 1
            if shared:
                x = lax.all_gather(x, GATHERED, tiled=True)
                chosen = lax.all_gather(chosen, GATHERED, axis=1, tiled=True)
            experts, shares = chosen[0], lax.bitcast_convert_type(chosen[1], jnp.float32)
            slot = chosen[2, :, 0] if len(chosen) > 2 else None
            first = lax.axis_index((*GATHERED, *TENSOR)) * weights[0].shape[0]
            out = self._own(x, experts - first, shares, weights, biases, slot)
            if shared:
                out = lax.psum_scatter(out.astype(x.dtype), GATHERED, tiled=True).astype(jnp.float32)
            return lax.psum(out if beside is None else out + beside[0], TENSOR)

        whole, own = PartitionSpec(), PartitionSpec(TENSOR)
        parts = [experts, lax.bitcast_convert_type(shares, experts.dtype)]
        if slot is not None:
            parts.append(jnp.broadcast_to(slot.astype(experts.dtype)[:, None], experts.shape))
            weights = tuple(with_rows(weight, None) for weight in weights)
        chosen = jnp.stack(parts)  # to be gathered as one
        return on_tensor(part, (whole, whole, own, own, own), whole)(x, chosen, weights, biases, beside)

    @property
    def _linears(self) -> tuple[StackedLinear, ...]:
        gates = () if self.gate_proj is None else (self.gate_proj,)
        return *gates, self.up_proj, self.down_proj

    def _own(
        self,
        x: jax.Array,
        experts: jax.Array,
        shares: jax.Array,
        weights: Weights,
        biases: Biases,
        slot: jax.Array | None,
    ) -> jax.Array:
        """The part of the experts that are here, the first of which is number 0. slot: of each token its adapter's,
        where there are such."""
        by_rows = functools.partial(self._by_rows, x, experts, shares, weights, biases, slot)
        if any("observe" in vars(linear) for linear in self._linears):  # somebody wants to see rows
            return by_rows()
        kept = [weight.kept for weight in weights]
        return mixture_of_experts(x, experts, shares, kept, biases, self.gating, self.of_inputs, self.total, by_rows)

    def _by_rows(
        self,
        x: jax.Array,
        experts: jax.Array,
        shares: jax.Array,
        weights: Weights,
        biases: Biases,
        slot: jax.Array | None,
    ) -> jax.Array:
        """Sorted by expert, in two products."""
        count, top_k = weights[0].shape[0], experts.shape[1]
        owner = jnp.where((experts >= 0) & (experts < count), experts, count).reshape(-1)
        order = jnp.argsort(owner)  # stable: what a token gets does not depend on chance
        sizes = jnp.bincount(owner, length=count + 1)[:count].astype(jnp.int32)
        if slot is not None:
            weights = tuple(with_rows(weight, slot[order // top_k]) for weight in weights)
        *raising, down = weights
        rows, factors = x[order // top_k], shares.reshape(-1)[order][:, None]
        if self.of_inputs:
            rows = rows * factors.astype(x.dtype)
        for linear in self._linears[:-1]:
            linear.observe(rows, sizes)
        raised = grouped_dots(rows, sizes, raising)
        if biases:
            own = owner[order]
            *of_raised, of_down = (bias.at[own].get(mode="fill", fill_value=0) for bias in biases)
            raised = [out + bias for out, bias in zip(raised, of_raised, strict=True)]
        hidden = self.gating(*raised)
        self.down_proj.observe(hidden, sizes)
        (outs,) = grouped_dots(hidden, sizes, [down], "float32")
        outs = outs + of_down.astype(jnp.float32) if biases else outs
        outs = outs if self.of_inputs else outs * factors
        place = jnp.zeros_like(order).at[order].set(jnp.arange(len(order), dtype=order.dtype))
        return jnp.sum(outs[place].reshape(len(x), top_k, -1), axis=1)


def with_rows(weight: Weight, slot: jax.Array | None) -> Weight:
    """A weight with adapters for rows of these slots; None: for none yet."""
    return dataclasses.replace(weight, slot=slot) if isinstance(weight, Adapted) else weight  # type: ignore[arg-type]


class SparseMLP(nnx.Module):
    """A router and its experts, and perhaps an MLP that all tokens take, times a gate of its own."""

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        routing: Routing,
        activation: str,
        gating: Gated | None = None,
        bias: bool = False,
        shared: int = 0,
        shared_gate: bool = False,
        shared_bias: bool = False,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        """gating: the experts' own, where it is not by the activation. bias: experts' linears have one. shared: the
        width of the MLP that all take; 0: there is none. shared_bias: its linears have one."""
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        gating = gating or Gating(activation)
        self.gate = Router(features, routing, **options)
        self.experts = Experts(features, hidden, routing=routing, gating=gating, bias=bias, **options)
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
