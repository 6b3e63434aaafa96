"""GPT-NeoX and Pythia (Black et al., arXiv:2204.06745): attention and MLP in parallel, each behind a layer norm of its
own, and a quarter of each head turns."""

from __future__ import annotations

import re
from functools import partial

import jax

from jaxinfer.attention import ForwardBatch
from jaxinfer.cache import LayerCache
from jaxinfer.layers.attention import Angles
from jaxinfer.models.config import ConfigReader, ModelConfig
from jaxinfer.models.decoder import DecoderConfig, DecoderForCausalLM, UngatedLayer, decoder_config, layer_norm
from jaxinfer.models.registry import Architecture
from jaxinfer.models.sources import Concat, Part, Source, Tensor
from jaxinfer.models.weights import ParamMapping, spelled

NAMES = {
    "model.embed_tokens.": "gpt_neox.embed_in.",
    "model.norm.": "gpt_neox.final_layer_norm.",
    "model.layers.": "gpt_neox.layers.",
    "lm_head.": "embed_out.",
    ".self_attn.o_proj.": ".attention.dense.",
    ".mlp.up_proj.": ".mlp.dense_h_to_4h.",
    ".mlp.down_proj.": ".mlp.dense_4h_to_h.",
}
# Old checkpoints carry the causal mask, and the rotary frequencies.
IGNORED = (r"layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)",)


class GPTNeoXLayer(UngatedLayer):
    """The MLP takes the layer's input, or, in a few models, what attention makes of it."""

    make_norm = staticmethod(layer_norm)

    def __init__(self, config: DecoderConfig, layer: int, **options: object):
        super().__init__(config, layer, **options)  # type: ignore[arg-type]
        self.parallel = config.parallel

    def __call__(
        self, x: jax.Array, angles: Angles, cache: LayerCache | None, batch: ForwardBatch
    ) -> tuple[jax.Array, LayerCache | None]:
        attended, cache = self.self_attn(self.input_layernorm(x), angles, cache, batch)
        attended = x + attended
        return attended + self.mlp(self.post_attention_layernorm(x if self.parallel else attended)), cache


class GPTNeoXForCausalLM(DecoderForCausalLM):
    """GPT-NeoX with its head."""

    layer = GPTNeoXLayer
    norm = staticmethod(layer_norm)


def parse(fields: ConfigReader) -> DecoderConfig:
    """`rotary_pct` is the share of a head that turns, and `rotary_emb_base` theta: what other architectures call these
    is not read, and must not say otherwise."""
    heads = fields.integer("num_attention_heads")
    fields.refuse("num_key_value_heads", heads)
    fields.refuse("head_dim", fields.integer("hidden_size") // heads)
    theta, share = fields.number("rotary_emb_base", 10000.0, minimum=1.0), fields.number("rotary_pct", 0.25)
    if share > 1:
        raise fields.error("rotary_pct", "it must be at most 1")
    fields.refuse("rope_theta", theta)
    fields.refuse("partial_rotary_factor", share)
    bias = fields.boolean("attention_bias", True)
    named = {"rope_theta": theta, "partial_rotary_factor": share}
    return decoder_config(
        ConfigReader(dict(fields.data) | named, fields.where),
        norm_eps=("layer_norm_eps", 1e-5),
        default_activation="gelu",
        default_partial=share,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=True,
        parallel=fields.boolean("use_parallel_residual", True),
    )


def source(name: str, config: ModelConfig) -> Source:
    """Of each head, its rows of q, k and v are fused in `query_key_value`, one head after the other."""
    name = spelled(name, NAMES)
    if match := re.fullmatch(r"(.*)\.self_attn\.([qkv])_proj\.(weight|bias)", name):
        parent, which, kind = match.groups()
        fused = Tensor(f"{parent}.attention.query_key_value.{kind}")
        heads, size, first = config.num_heads, config.head_dim, "qkv".index(which)
        parts = (Part(fused, (3 * head + first) * size, 3 * heads * size) for head in range(heads))
        return Concat(tuple(parts), (size,) * heads)
    return Tensor(name)


def weights(config: ModelConfig) -> ParamMapping:
    """Names are GPT-NeoX's."""
    of = partial(source, config=config)
    return ParamMapping(of, "gpt_neox.", IGNORED, "gpt_neox.embed_in.weight", "embed_out.weight")


ARCHITECTURE = Architecture(parse, GPTNeoXForCausalLM, weights)
