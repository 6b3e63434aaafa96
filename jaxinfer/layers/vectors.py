"""What becomes of the vectors of texts: the modules that sentence-transformers puts after a pooling."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer import weights as kinds

# Classes of torch.nn, with their default arguments.
TORCH_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "Identity": lambda x: x,
    "CELU": jax.nn.celu,
    "ELU": jax.nn.elu,
    "GELU": lambda x: jax.nn.gelu(x, approximate=False),
    "Hardsigmoid": jax.nn.hard_sigmoid,
    "Hardswish": jax.nn.hard_swish,
    "Hardtanh": jax.nn.hard_tanh,
    "LeakyReLU": jax.nn.leaky_relu,
    "LogSigmoid": jax.nn.log_sigmoid,
    "Mish": jax.nn.mish,
    "ReLU": jax.nn.relu,
    "ReLU6": jax.nn.relu6,
    "SELU": jax.nn.selu,
    "SiLU": jax.nn.silu,
    "Sigmoid": jax.nn.sigmoid,
    "Softplus": jax.nn.softplus,
    "Softsign": jax.nn.soft_sign,
    "Tanh": jnp.tanh,
    "Tanhshrink": lambda x: x - jnp.tanh(x),
}
Weights = Mapping[str, jax.Array]


class Step(Protocol):
    """A module."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Its weights, by their names in a checkpoint."""

    def __call__(self, x: jax.Array, weights: Weights) -> jax.Array:
        """Vectors float32 `[R, out]` of others, `[R, in]`."""


@dataclass(frozen=True)
class Dense:
    """`activation(W x + b)`.

    in_features, out_features: widths.
    bias: there is b.
    activation: a name in TORCH_ACTIVATIONS.
    residual: x is added, or what a matrix makes of it where widths differ.
    """

    in_features: int
    out_features: int
    bias: bool = True
    activation: str = "Tanh"
    residual: bool = False

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        matrix = self.out_features, self.in_features
        shapes: dict[str, tuple[int, ...]] = {"linear.weight": matrix}
        if self.bias:
            shapes["linear.bias"] = (self.out_features,)
        if self.residual and self.in_features != self.out_features:
            shapes["residual.weight"] = matrix
        return shapes

    def __call__(self, x: jax.Array, weights: Weights) -> jax.Array:
        out = _product(x, weights["linear.weight"])
        out = TORCH_ACTIVATIONS[self.activation](out + weights["linear.bias"] if self.bias else out)
        if not self.residual:
            return out
        return out + (_product(x, weights["residual.weight"]) if "residual.weight" in weights else x)


@dataclass(frozen=True)
class VectorNorm:
    """Layer norm.

    features: the width.
    """

    features: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(("norm.weight", "norm.bias"), (self.features,))

    def __call__(self, x: jax.Array, weights: Weights) -> jax.Array:
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5)
        return x * weights["norm.weight"] + weights["norm.bias"]


@dataclass(frozen=True)
class Normalize:
    """To length 1."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {}

    def __call__(self, x: jax.Array, weights: Weights) -> jax.Array:
        return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _product(x: jax.Array, matrix: jax.Array) -> jax.Array:
    return kinds.dot(x, kinds.Dense(matrix, (None, None)), "float32")
