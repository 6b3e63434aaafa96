"""Which experts a token goes to, and what share each has in what becomes of it: families differ in data alone."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from jaxinfer.weights.products import by_xla

SCORES = ("softmax", "sigmoid")


@dataclass(frozen=True)
class Routing:
    """How experts are chosen, always in float32.

    experts: how many there are.
    top_k: how many a token goes to.
    scores: what is made of the router's logits, one of SCORES.
    among_chosen: scores are of the logits of those that are chosen alone.
    linear_bias: is added to logits; a parameter.
    bias: is added to scores for the choice, and not to shares; a parameter.
    sparsemixer: an expert's share is a softmax over it and those behind it whose logits are less by at most twice this
        share of the larger one; None: shares are scores.
    groups, groups_kept: experts are in groups of equal size, and only those of the best groups may be chosen.
    group_best: a group is as good as the sum of so many of its best experts.
    normalized: shares are divided by their sum and what is added to it, or by least_sum where that is more.
    scale: what shares are multiplied with.
    of_inputs: shares are factors of what experts take, not of what they make.
    """

    experts: int
    top_k: int
    scores: str = "softmax"
    among_chosen: bool = False
    linear_bias: bool = False
    bias: bool = False
    sparsemixer: float | None = None
    groups: int = 1
    groups_kept: int = 1
    group_best: int = 1
    normalized: bool = False
    least_sum: float = 1e-20
    added_to_sum: float = 0.0
    scale: float = 1.0
    of_inputs: bool = False


def route(logits: jax.Array, routing: Routing, bias: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Of `logits f32[T, E]` the experts of each token, i32[T, top_k], the best first, and their shares, f32[T, top_k].

    Groups are those of DeepSeek-V3 (arXiv:2412.19437), the bias that of Wang et al. (arXiv:2408.15664).
    """
    if routing.sparsemixer is not None:
        experts, shares = _sparsemixer(logits, routing.top_k, routing.sparsemixer)
    elif routing.among_chosen:
        best, experts = lax.top_k(logits, routing.top_k)
        shares = _scores(best, routing)
    else:
        scores = _scores(logits, routing)
        choice = scores if bias is None else scores + bias.astype(jnp.float32)
        _, experts = lax.top_k(_of_best_groups(choice, routing), routing.top_k)
        shares = jnp.take_along_axis(scores, experts, axis=1)
    if routing.normalized:
        total = jnp.sum(shares, axis=1, keepdims=True) + jnp.float32(routing.added_to_sum)
        shares = shares / jnp.maximum(total, jnp.float32(routing.least_sum))
    return experts, shares if routing.scale == 1 else shares * jnp.float32(routing.scale)


def _scores(logits: jax.Array, routing: Routing) -> jax.Array:
    return jax.nn.softmax(logits, axis=-1) if routing.scores == "softmax" else jax.nn.sigmoid(logits)


def _sparsemixer(logits: jax.Array, top_k: int, jitter: float) -> tuple[jax.Array, jax.Array]:
    """SparseMixer-v2's choice (Liu et al., arXiv:2409.12136), as it is after training: one expert after the other."""
    best, experts = lax.top_k(logits, top_k)
    chosen = (experts[:, :, None] == jnp.arange(logits.shape[1], dtype=experts.dtype)).astype(jnp.int32)
    left = jnp.cumsum(chosen, axis=1) == chosen
    best, others = best[:, :, None], logits[:, None]
    near = best - others <= 2 * jitter * jnp.maximum(jnp.abs(others), best)
    return experts, 1 / jnp.sum(jnp.where(near & left, jnp.exp(others - best), 0), axis=-1)


def _of_best_groups(choice: jax.Array, routing: Routing) -> jax.Array:
    """What is left to choose from: the others are below anything."""
    if routing.groups_kept == routing.groups:
        return choice
    grouped = choice.reshape(len(choice), routing.groups, -1)
    worth = jnp.sum(lax.top_k(grouped, routing.group_best)[0], axis=-1)
    _, kept = lax.top_k(worth, routing.groups_kept)
    stays = jnp.any(kept[:, :, None] == jnp.arange(routing.groups, dtype=kept.dtype), axis=1)
    return jnp.where(stays[:, :, None], grouped, -jnp.inf).reshape(choice.shape)


class Router(nnx.Module):
    """`route(x W^T)`. Its weight is no product's: it is never quantized."""

    def __init__(self, features: int, routing: Routing, *, dtype: DTypeLike, rngs: nnx.Rngs):
        values = jax.random.normal(rngs.params(), (routing.experts, features), jnp.dtype(dtype))
        self.weight = nnx.Param(values * jnp.asarray(0.02, dtype), axes=(None, None))
        zeros = jnp.zeros(routing.experts, "float32")
        self.bias = nnx.Param(zeros, axes=(None,)) if routing.linear_bias else None
        self.e_score_correction_bias = nnx.Param(zeros, axes=(None,)) if routing.bias else None
        self.routing = routing

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        (logits,) = by_xla(x.astype(jnp.float32), [self.weight.get_value()])
        if self.bias is not None:
            logits = logits + self.bias.get_value()
        bias = self.e_score_correction_bias
        return route(logits, self.routing, None if bias is None else bias.get_value())
