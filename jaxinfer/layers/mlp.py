"""Feed-forward blocks and activation functions by their names in config.json."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxinfer.layers.linear import Linear, linears

_gelu, _tanh_gelu = partial(jax.nn.gelu, approximate=False), partial(jax.nn.gelu, approximate=True)
# Those of transformers that are functions of one number.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    **dict.fromkeys(("gelu", "gelu_python"), _gelu),
    "gelu_10": lambda x: jnp.clip(_gelu(x), -10, 10),
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate"), _tanh_gelu),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "leaky_relu": jax.nn.leaky_relu,
    "hardswish": jax.nn.hard_swish,
    "mish": jax.nn.mish,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "linear": lambda x: x,
    "sqrtsoftplus": lambda x: jnp.sqrt(jax.nn.softplus(x)),
    "laplace": lambda x: 0.5 * (1 + jax.lax.erf((x - 0.707107) / (0.282095 * math.sqrt(2)))),  # arXiv:2209.10655
}


@dataclass(frozen=True)
class Gating:
    """What becomes of a gate and what it opens for: `act(gate) * up`.

    activation: a name in ACTIVATIONS.
    """

    activation: str

    def __call__(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        return ACTIVATIONS[self.activation](gate) * up


@dataclass(frozen=True)
class ClampedSwiGLU:
    """gpt-oss's: `gate * sigmoid(alpha * gate) * (up + 1)`.

    alpha: of the sigmoid.
    limit: the gate is at most that, and up no further from zero.
    """

    alpha: float
    limit: float

    def __call__(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit)
        return gate * jax.nn.sigmoid(self.alpha * gate) * (up + 1)


class GatedMLP(nnx.Module):
    """`down(act(gate(x)) * up(x))` (SwiGLU, Shazeer, arXiv:2002.05202).

    bias: all three have one; down_bias: `down` has, whatever the others have.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        activation: str,
        bias: bool = False,
        down_bias: bool = False,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.gate_proj = Linear(features, hidden, axes=("mlp", "embed"), bias=bias, dtype=dtype, rngs=rngs)
        self.up_proj = Linear(features, hidden, axes=("mlp", "embed"), bias=bias, dtype=dtype, rngs=rngs)
        self.down_proj = Linear(hidden, features, axes=("embed", "mlp"), bias=bias or down_bias, dtype=dtype, rngs=rngs)
        self.gating = Gating(activation)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(self.hidden(x))

    def hidden(self, x: jax.Array) -> jax.Array:
        """What `down` gets."""
        gate, up = linears(x, self.gate_proj, self.up_proj)
        return self.gating(gate, up)


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
