"""Feed-forward blocks and activation functions by their names in config.json."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxinfer.layers.linear import Linear, linears

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "gelu_fast": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


class GatedMLP(nnx.Module):
    """`down(act(gate(x)) * up(x))` (SwiGLU, Shazeer, arXiv:2002.05202)."""

    def __init__(
        self, features: int, hidden: int, *, activation: str, bias: bool = False, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.gate_proj = Linear(features, hidden, axes=("mlp", "embed"), bias=bias, dtype=dtype, rngs=rngs)
        self.up_proj = Linear(features, hidden, axes=("mlp", "embed"), bias=bias, dtype=dtype, rngs=rngs)
        self.down_proj = Linear(hidden, features, axes=("embed", "mlp"), bias=bias, dtype=dtype, rngs=rngs)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = linears(x, self.gate_proj, self.up_proj)
        return self.down_proj(ACTIVATIONS[self.activation](gate) * up)


class MLP(nnx.Module):
    """`down(act(up(x)))`."""

    def __init__(
        self, features: int, hidden: int, *, activation: str, bias: bool = False, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.up_proj = Linear(features, hidden, axes=("mlp", "embed"), bias=bias, dtype=dtype, rngs=rngs)
        self.down_proj = Linear(hidden, features, axes=("embed", "mlp"), bias=bias, dtype=dtype, rngs=rngs)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(ACTIVATIONS[self.activation](self.up_proj(x)))
