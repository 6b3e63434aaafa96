"""The gated short convolution of LFM2 (Liquid AI, arXiv:2511.23404), which it has in place of attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import jax
from flax import nnx
from jax.typing import DTypeLike

from jaxinfer.attention import ForwardBatch
from jaxinfer.cache import LayerCache, RecurrentSpec
from jaxinfer.layers.convolution import Convolution, causal_convolution
from jaxinfer.layers.linear import Linear, linears


@dataclass(frozen=True)
class ShortConvolutionConfig:
    """What shapes one.

    width: tokens that it sees.
    bias: it and its projections have one.
    """

    width: int
    bias: bool

    def heads_of(self, features: int) -> int:
        return features

    def module(self, features: int, *, eps: float, dtype: DTypeLike, rngs: nnx.Rngs) -> ShortConvolution:
        return ShortConvolution(features, self, dtype=dtype, rngs=rngs)


class ShortConvolution(nnx.Module):
    """`out(c(x) * conv(b(x) * in(x)))`."""

    def __init__(self, features: int, config: ShortConvolutionConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.b_proj, self.c_proj, self.x_proj = (
            Linear(features, features, axes=("heads", "embed"), bias=config.bias, dtype=dtype, rngs=rngs)
            for _ in range(3)
        )
        self.conv = Convolution(features, config.width, bias=config.bias, dtype=dtype)
        self.out_proj = Linear(features, features, axes=("embed", "heads"), bias=config.bias, dtype=dtype, rngs=rngs)
        self.cache_spec = RecurrentSpec(((config.width - 1, features),), ("float32",), (1,))

    def __call__(
        self, x: jax.Array, cache: LayerCache | None, batch: ForwardBatch
    ) -> tuple[jax.Array, LayerCache | None]:
        """`x [T, D]` -> `[T, D]`, and its last inputs after this step."""
        b, c, x = linears(x, self.b_proj, self.c_proj, self.x_proj)
        past = None if cache is None else cast(tuple[jax.Array], cache)[0]
        weight, bias = self.conv.weight.get_value()[:, 0], self.conv.bias
        y, past = causal_convolution(b * x, weight, None if bias is None else bias.get_value(), past, batch)
        return self.out_proj(c * y.astype(x.dtype)), None if past is None else (past,)
