"""Falcon-H1 (TII, arXiv:2507.22448): Mamba-2 and attention beside each other in each layer, and a dozen multipliers."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import jax
from flax import nnx
from jax.typing import DTypeLike

from jaxinfer.attention import ForwardBatch
from jaxinfer.cache import LayerCache
from jaxinfer.layers.attention import Angles
from jaxinfer.layers.linear import linears
from jaxinfer.layers.mlp import GatedMLP
from jaxinfer.layers.recurrence import MixerConfig
from jaxinfer.models.causal import SmoothingPairs
from jaxinfer.models.config import ConfigReader, ModelConfig
from jaxinfer.models.decoder import (
    IGNORED,
    DecoderConfig,
    DecoderForCausalLM,
    decoder_config,
    rms_norm,
    self_attention,
)
from jaxinfer.models.registry import Architecture
from jaxinfer.models.sources import Source, Tensor
from jaxinfer.models.state_space import mamba2_config, mamba2_part
from jaxinfer.models.weights import ParamMapping

Halfway = tuple[jax.Array, jax.Array, jax.Array]  # hidden states, normed, and what Mamba made of them


@dataclass(frozen=True)
class FalconH1Config(DecoderConfig):
    """What shapes Falcon-H1. Its layers are two blocks each here, as each keeps two things of a sequence.

    attention_scales: factors of what attention takes and makes.
    mamba_scale: of what Mamba makes.
    mlp_scales: of what MLPs' gates and outputs are.
    """

    attention_scales: tuple[float, float] = field(kw_only=True)
    mamba_scale: float = field(kw_only=True)
    mlp_scales: tuple[float, float] = field(kw_only=True)


class ScaledMLP(GatedMLP):
    """With factors of the gate and of the output."""

    scales: tuple[float, float] = (1.0, 1.0)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = linears(x, self.gate_proj, self.up_proj)
        return self.down_proj(self.gating(gate * self.scales[0], up)) * self.scales[1]


class MambaBlock(nnx.Module):
    """The first half of a layer."""

    SMOOTHING_PAIRS: ClassVar[SmoothingPairs] = ()

    def __init__(self, config: FalconH1Config, block: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        mixer = cast(MixerConfig, config.mixers[block])
        self.input_layernorm = rms_norm(config, dtype)
        self.mixer = mixer.module(config.hidden_size, eps=config.norm_eps, dtype=dtype, rngs=rngs)
        self.scale = config.mamba_scale

    def __call__(
        self, x: jax.Array, angles: Angles, cache: LayerCache | None, batch: ForwardBatch
    ) -> tuple[Halfway, LayerCache | None]:
        normed = self.input_layernorm(x)
        mixed, cache = self.mixer(normed, cache, batch)
        return (x, normed, mixed * self.scale), cache


class AttentionBlock(nnx.Module):
    """The second half: attention of the same normed hidden states, and the MLP."""

    SMOOTHING_PAIRS: ClassVar[SmoothingPairs] = (
        ("self_attn.v_proj", ("self_attn.o_proj",)),
        ("pre_ff_layernorm", ("feed_forward.gate_proj", "feed_forward.up_proj")),
        ("feed_forward.up_proj", ("feed_forward.down_proj",)),
    )

    def __init__(self, config: FalconH1Config, block: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.self_attn = self_attention(config, block, dtype=dtype, rngs=rngs)
        self.pre_ff_layernorm = rms_norm(config, dtype)
        self.feed_forward = ScaledMLP(
            config.hidden_size,
            config.intermediate_size,
            activation=config.activation,
            bias=config.mlp_bias,
            dtype=dtype,
            rngs=rngs,
        )
        self.feed_forward.scales = config.mlp_scales
        self.scales = config.attention_scales

    def __call__(
        self, halfway: Halfway, angles: Angles, cache: LayerCache | None, batch: ForwardBatch
    ) -> tuple[jax.Array, LayerCache | None]:
        x, normed, mixed = halfway
        attended, cache = self.self_attn(normed * self.scales[0], angles, cache, batch)
        x = x + mixed + attended * self.scales[1]
        return x + self.feed_forward(self.pre_ff_layernorm(x)), cache


def block(config: FalconH1Config, index: int, **options: Any) -> nnx.Module:
    """A half of a layer."""
    return (MambaBlock if index % 2 == 0 else AttentionBlock)(config, index, **options)


class FalconH1ForCausalLM(DecoderForCausalLM):
    """Falcon-H1 with its head."""

    layer = staticmethod(block)


def parse(fields: ConfigReader) -> FalconH1Config:
    """`attention_bias` covers all four projections; `key_multiplier` is a factor of attention's scores."""
    bias = fields.boolean("attention_bias", False)
    base = decoder_config(
        fields.with_defaults(max_position_embeddings=8192),
        default_kv_heads=8,
        norm_eps=("rms_norm_eps", 1e-5),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=fields.boolean("mlp_bias", False),
        embedding_scale=fields.number("embedding_multiplier", 1.0),
        logit_scale=fields.number("lm_head_multiplier", 1.0),
    )

    def numbers(name: str, count: int) -> tuple[float, ...]:
        return (1.0,) * count if fields.data.get(name) is None else fields.numbers(name, count)

    inner = fields.integer("mamba_d_ssm", 1024) if fields.data.get("mamba_d_ssm", 0) is not None else None
    mixer = mamba2_config(
        fields,
        base.activation,
        inner,
        out_bias=fields.boolean("projectors_bias", False),
        normed=fields.boolean("mamba_rms_norm", False),
        norm_first=fields.boolean("mamba_norm_before_gate", True),
        in_scale=fields.number("ssm_in_multiplier", 1.0),
        scales=numbers("ssm_multipliers", 5),
    )
    layers = base.num_layers
    scales = (fields.number(f"attention_{which}_multiplier", 1.0) for which in ("in", "out"))
    return base.extended(
        FalconH1Config,
        num_layers=2 * layers,
        ropes=base.ropes * 2,
        windows=base.windows * 2,
        mixers=(mixer, None) * layers,
        scale=base.scale * fields.number("key_multiplier", 1.0),
        attention_scales=cast(Any, tuple(scales)),
        mamba_scale=fields.number("ssm_out_multiplier", 1.0),
        mlp_scales=cast(Any, numbers("mlp_multipliers", 2)),
    )


def weights(config: ModelConfig) -> ParamMapping:
    """A layer's two blocks are one in checkpoints."""

    def source(name: str) -> Source:
        name = re.sub(r"\.layers\.(\d+)\.", lambda match: f".layers.{int(match[1]) // 2}.", name)
        name = name.replace("model.norm.", "model.final_layernorm.")
        return mamba2_part(name, config, "mamba") or Tensor(name.replace(".mixer.", ".mamba."))

    return ParamMapping(source, ignored=IGNORED)


ARCHITECTURE = Architecture(parse, FalconH1ForCausalLM, weights)
