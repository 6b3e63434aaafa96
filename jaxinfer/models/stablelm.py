"""StableLM (Stability AI, arXiv:2402.17834): layer norms, a quarter of each head turns; in larger models attention and
MLP are parallel, and each head has a norm of its own."""

from __future__ import annotations

import re
from functools import partial

from flax import nnx
from jax.typing import DTypeLike

from jaxinfer.models.config import ConfigReader, ModelConfig
from jaxinfer.models.decoder import (
    IGNORED,
    DecoderConfig,
    DecoderForCausalLM,
    DecoderLayer,
    ParallelLayer,
    decoder_config,
    head_norm_attention,
    layer_norm,
)
from jaxinfer.models.registry import Architecture
from jaxinfer.models.sources import Source, Stack, Tensor
from jaxinfer.models.weights import ParamMapping

DEFAULTS = {"num_key_value_heads": 32, "max_position_embeddings": 4096}


class StableLMLayer(DecoderLayer):
    """Llama's, with layer norms."""

    make_norm = staticmethod(layer_norm)
    make_attention = staticmethod(head_norm_attention)


class ParallelStableLMLayer(ParallelLayer):
    """The same, with attention and MLP behind one norm."""

    make_norm = staticmethod(layer_norm)
    make_attention = staticmethod(head_norm_attention)


def make_layer(
    config: DecoderConfig, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs
) -> StableLMLayer | ParallelStableLMLayer:
    """Of either kind."""
    kind = ParallelStableLMLayer if config.parallel else StableLMLayer
    return kind(config, layer, dtype=dtype, rngs=rngs)


class StableLMForCausalLM(DecoderForCausalLM):
    """StableLM with its head."""

    layer = staticmethod(make_layer)
    norm = staticmethod(layer_norm)


def parse(fields: ConfigReader) -> DecoderConfig:
    """Heads have one size, `hidden_size / num_attention_heads`."""
    fields = fields.with_defaults(**DEFAULTS)
    fields.refuse("head_dim", fields.integer("hidden_size") // fields.integer("num_attention_heads"))
    return decoder_config(
        fields,
        norm_eps=("layer_norm_eps", 1e-5),
        default_partial=0.25,
        qkv_bias=fields.boolean("use_qkv_bias", False),
        qk_norm=fields.boolean("qk_layernorm", False),
        parallel=fields.boolean("use_parallel_residual", False),
    )


def source(name: str, config: ModelConfig) -> Source:
    """Heads' norms are modules of their own."""
    if match := re.fullmatch(r"(.*\.self_attn\.)([qk])_norm\.weight", name):
        parent, which = match.groups()
        heads = config.num_heads if which == "q" else config.num_kv_heads
        return Stack(tuple(Tensor(f"{parent}{which}_layernorm.norms.{i}.weight") for i in range(heads)))
    return Tensor(name)


def weights(config: ModelConfig) -> ParamMapping:
    """Names are the module's own but for those of heads' norms."""
    return ParamMapping(partial(source, config=config), ignored=IGNORED)


ARCHITECTURE = Architecture(parse, StableLMForCausalLM, weights)
