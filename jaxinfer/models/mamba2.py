"""Mamba-2 (Dao and Gu, arXiv:2405.21060), and Codestral Mamba: state spaces alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxinfer.attention import ForwardBatch
from jaxinfer.cache import Cache, LayerCache
from jaxinfer.layers.attention import Angles
from jaxinfer.layers.mamba2 import Mamba2Config
from jaxinfer.layers.mlp import ACTIVATIONS
from jaxinfer.layers.recurrence import MixerConfig
from jaxinfer.layers.stack import Stream
from jaxinfer.models.causal import SmoothingPairs
from jaxinfer.models.config import ConfigReader, ModelConfig
from jaxinfer.models.decoder import DecoderConfig, DecoderForCausalLM, num_layers, rms_norm
from jaxinfer.models.registry import Architecture
from jaxinfer.models.sources import Source, Tensor
from jaxinfer.models.state_space import CONTEXT, MAMBA2, groups_of, mamba2_part, time_step_limits
from jaxinfer.models.weights import ParamMapping, spelled

NAMES = {"model.embed_tokens.": "backbone.embeddings.", "model.norm.": "backbone.norm_f.", "model.": "backbone."}


@dataclass(frozen=True)
class MambaConfig(DecoderConfig):
    """What shapes a decoder of mixers alone.

    wide: hidden states are in float32 from layer to layer.
    """

    wide: bool = True


class MambaLayer(nnx.Module):
    """A mixer behind a norm, added to the hidden states."""

    SMOOTHING_PAIRS: ClassVar[SmoothingPairs] = (("norm", tuple(f"mixer.{name}" for name in MAMBA2)),)

    def __init__(self, config: MambaConfig, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm = rms_norm(config, dtype)
        mixer = cast(MixerConfig, config.mixers[layer])
        self.mixer = mixer.module(config.hidden_size, eps=config.norm_eps, dtype=dtype, rngs=rngs)
        self.dtype = jnp.dtype(dtype)

    def __call__(
        self, x: jax.Array, angles: Angles, cache: LayerCache | None, batch: ForwardBatch
    ) -> tuple[jax.Array, LayerCache | None]:
        mixed, cache = self.mixer(self.norm(x.astype(self.dtype)), cache, batch)
        return x + mixed.astype(x.dtype), cache


class MambaForCausalLM(DecoderForCausalLM):
    """Mixers with a head."""

    config: MambaConfig
    layer = MambaLayer

    def embed(self, batch: ForwardBatch) -> Stream:
        x = super().embed(batch)
        return x.astype(jnp.float32) if self.config.wide else x

    def hidden(self, batch: ForwardBatch, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
        x, cache = super().hidden(batch, cache)
        return x.astype(self.model.embed_tokens.dtype), cache


def mamba_config(fields: ConfigReader, heads: int, mixer: MixerConfig, tied: bool) -> MambaConfig:
    """Of a decoder with nothing but mixers. heads: what a mesh splits. tied: where nothing is said."""
    layers, hidden = num_layers(fields), fields.integer("hidden_size")
    return MambaConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=1,
        max_context=CONTEXT,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", tied),
        intermediate_size=0,
        activation="silu",
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        ropes=(None,) * layers,
        windows=(None,) * layers,
        scale=1.0,
        mixers=(mixer,) * layers,
        wide=fields.boolean("residual_in_fp32", True),
    )


def parse(fields: ConfigReader) -> MambaConfig:
    """`num_heads` heads of `head_dim` are together `expand` times as wide as the model."""
    heads, size = fields.integer("num_heads", 128), fields.integer("head_dim", 64)
    inner = fields.integer("expand", 2) * fields.integer("hidden_size")
    if heads * size != inner:
        product = f"its product with {fields.named('head_dim')}, must be expand * hidden_size, {inner}"
        raise fields.error("num_heads", product)
    bias = fields.boolean("use_bias", False)
    mixer = Mamba2Config(
        heads=heads,
        head_dim=size,
        groups=groups_of(fields, "n_groups", 8, "num_heads", heads),
        state_size=fields.integer("state_size", 128),
        width=fields.integer("conv_kernel", 4, minimum=2),
        activation=fields.choice("hidden_act", "silu", tuple(ACTIVATIONS)),
        conv_bias=fields.boolean("use_conv_bias", True),
        in_bias=bias,
        out_bias=bias,
        limits=time_step_limits(fields),
    )
    return mamba_config(fields, heads, mixer, tied=False)


def weights(config: ModelConfig) -> ParamMapping:
    """Under names of its own; all projections are in one tensor."""

    def source(name: str) -> Source:
        own = spelled(name, NAMES)
        return mamba2_part(own, config, "mixer") or Tensor(own)

    return ParamMapping(source, "backbone.", embedding="backbone.embeddings.weight")


ARCHITECTURE = Architecture(parse, MambaForCausalLM, weights)
