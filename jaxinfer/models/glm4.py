"""GLM-4-0414 (Zhipu, 2025): GLM's layer with norms after its blocks, too."""

from __future__ import annotations

import jax
from flax import nnx
from jax.typing import DTypeLike

from jaxinfer.attention import ForwardBatch
from jaxinfer.cache import LayerCache
from jaxinfer.layers.attention import Angles
from jaxinfer.models.decoder import DecoderConfig, DecoderForCausalLM, DecoderLayer, rms_norm
from jaxinfer.models.glm import parse, weights
from jaxinfer.models.registry import Architecture


class Glm4Layer(DecoderLayer):
    """What blocks add is normed."""

    def __init__(self, config: DecoderConfig, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        super().__init__(config, layer, dtype=dtype, rngs=rngs)
        self.post_self_attn_layernorm = rms_norm(config, dtype)
        self.post_mlp_layernorm = rms_norm(config, dtype)

    def __call__(
        self, x: jax.Array, angles: Angles, cache: LayerCache | None, batch: ForwardBatch
    ) -> tuple[jax.Array, LayerCache | None]:
        attended, cache = self.self_attn(self.input_layernorm(x), angles, cache, batch)
        x = x + self.post_self_attn_layernorm(attended)
        return x + self.post_mlp_layernorm(self.mlp(self.post_attention_layernorm(x))), cache


class Glm4ForCausalLM(DecoderForCausalLM):
    """GLM-4-0414 with its head."""

    layer = Glm4Layer


ARCHITECTURE = Architecture(parse, Glm4ForCausalLM, weights)
