"""What decoders share of which some layers, or all, have something else in place of attention."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import cast

import jax
from flax import nnx
from jax.typing import DTypeLike

from jaxinfer.attention import ForwardBatch
from jaxinfer.cache import LayerCache
from jaxinfer.layers.attention import Angles
from jaxinfer.layers.recurrence import MixerConfig
from jaxinfer.models.causal import SmoothingPairs
from jaxinfer.models.decoder import DecoderConfig, DecoderLayer
from jaxinfer.models.moe import MoeConfig, SparseLayer
from jaxinfer.models.sources import Part, Source, Tensor

_PROJECTION = re.compile(r"(.*)\.mixer\.(\w+)_proj\.(weight|bias)")


class MixerLayer(DecoderLayer):
    """What config has in place of attention, then an MLP, each behind a norm and added to the hidden states."""

    def __init__(self, config: DecoderConfig, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        make, mixer = type(self), cast(MixerConfig, config.mixers[layer])
        self.input_layernorm = make.make_norm(config, dtype)
        self.mixer = mixer.module(config.hidden_size, eps=config.norm_eps, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = make.make_norm(config, dtype)
        self.mlp = make.make_mlp(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: jax.Array, angles: Angles, cache: LayerCache | None, batch: ForwardBatch
    ) -> tuple[jax.Array, LayerCache | None]:
        mixed, cache = self.mixer(self.input_layernorm(x), cache, batch)
        x = x + mixed
        return x + self.feed_forward(self.post_attention_layernorm(x), batch), cache


class SparseMixerLayer(MixerLayer):
    """The same with experts."""

    make_mlp, feed_forward = SparseLayer.make_mlp, SparseLayer.feed_forward


def part_of(name: str, mixer: str, sizes: Mapping[str, int]) -> Source | None:
    """A mixer's projection that is one of several in a tensor `in_proj`, in this order; None of other weights. mixer:
    what the module is in checkpoints; sizes: rows of each."""
    match = _PROJECTION.fullmatch(name)
    if match is None or match[2] not in sizes:
        return None
    before = list(sizes.values())[: list(sizes).index(match[2])]
    return Part(Tensor(f"{match[1]}.{mixer}.in_proj.{match[3]}"), sum(before), sum(sizes.values()))


def smoothing_pairs(*projections: str) -> SmoothingPairs:
    """Of a layer whose mixer takes the normed hidden states by these."""
    return (
        ("input_layernorm", tuple(f"mixer.{name}" for name in projections)),
        *DecoderLayer.SMOOTHING_PAIRS[2:],
    )


def hybrid(mixer: type[DecoderLayer], attention: type[DecoderLayer] = DecoderLayer) -> Callable[..., DecoderLayer]:
    """Makes a layer of one of two kinds."""

    def layer(config: DecoderConfig, index: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> DecoderLayer:
        return (attention if config.mixers[index] is None else mixer)(config, index, dtype=dtype, rngs=rngs)

    return layer


def sparse_hybrid(
    mixer: type[DecoderLayer],
    sparse_mixer: type[DecoderLayer],
    attention: type[DecoderLayer] = DecoderLayer,
    sparse_attention: type[DecoderLayer] = SparseLayer,
) -> Callable[..., DecoderLayer]:
    """The same where some layers have experts."""
    dense, sparse = hybrid(mixer, attention), hybrid(sparse_mixer, sparse_attention)

    def layer(config: MoeConfig, index: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> DecoderLayer:
        return (sparse if config.sparse[index] else dense)(config, index, dtype=dtype, rngs=rngs)

    return layer
