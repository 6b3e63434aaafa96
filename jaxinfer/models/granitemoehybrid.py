"""Granite 4 (IBM, 2025): Mamba-2 in most layers, in the others attention, as a rule without positions; Granite's
multipliers; experts beside an MLP that all tokens take, or that MLP alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import jax
from flax import nnx
from jax.typing import DTypeLike

from jaxinfer.attention import ForwardBatch
from jaxinfer.cache import LayerCache
from jaxinfer.layers.attention import Angles
from jaxinfer.models.config import LINEAR, ConfigReader, ModelConfig, layer_types_of
from jaxinfer.models.decoder import IGNORED, DecoderConfig, DecoderForCausalLM, DecoderLayer
from jaxinfer.models.granite import GraniteLayer
from jaxinfer.models.granite import parse as parse_granite
from jaxinfer.models.granitemoe import GraniteMoeLayer
from jaxinfer.models.granitemoe import parse as parse_sparse
from jaxinfer.models.granitemoe import weights as sparse_weights
from jaxinfer.models.hybrid import MixerLayer, hybrid, smoothing_pairs
from jaxinfer.models.moe import MoeConfig, SparseLayer
from jaxinfer.models.registry import Architecture
from jaxinfer.models.sources import Part, Source, Tensor
from jaxinfer.models.state_space import MAMBA2, OLDER, mamba2_config, mamba2_part
from jaxinfer.models.weights import ParamMapping


class GraniteMambaLayer(MixerLayer):
    """Mamba-2, then an MLP; what both add is scaled."""

    SMOOTHING_PAIRS = smoothing_pairs(*MAMBA2)

    def __init__(self, config: DecoderConfig, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        super().__init__(config, layer, dtype=dtype, rngs=rngs)
        self.scale = config.residual_scale

    def __call__(
        self, x: jax.Array, angles: Angles, cache: LayerCache | None, batch: ForwardBatch
    ) -> tuple[jax.Array, LayerCache | None]:
        mixed, cache = self.mixer(self.input_layernorm(x), cache, batch)
        x = x + mixed * self.scale
        return x + self.feed_forward(self.post_attention_layernorm(x), batch) * self.scale, cache


class SparseGraniteMambaLayer(GraniteMambaLayer):
    """The same with experts."""

    SMOOTHING_PAIRS = GraniteMambaLayer.SMOOTHING_PAIRS[:1]
    make_mlp, feed_forward = SparseLayer.make_mlp, SparseLayer.feed_forward


DENSE, SPARSE = hybrid(GraniteMambaLayer, GraniteLayer), hybrid(SparseGraniteMambaLayer, GraniteMoeLayer)


def layer(config: DecoderConfig, index: int, **options: Any) -> DecoderLayer:
    """One of the four kinds."""
    return (SPARSE if isinstance(config, MoeConfig) else DENSE)(config, index, **options)


class GraniteMoeHybridForCausalLM(DecoderForCausalLM):
    """Granite 4 with its head."""

    layer = staticmethod(layer)


def parse(fields: ConfigReader) -> DecoderConfig:
    """Without `position_embedding_type` "rope" there are no positions. Where `num_local_experts` is 0, `shared_mlp` is
    the MLP."""
    fields.refuse("mlp_bias", False)
    if fields.integer("num_local_experts", 8, minimum=0):
        base: DecoderConfig = parse_sparse(fields, shared_experts=True, default_shared=1024)
    else:
        base = replace(parse_granite(fields), intermediate_size=fields.integer("shared_intermediate_size", 1024))
    name = "layer_types" if fields.data.get("layer_types") is not None else "layers_block_type"
    types = layer_types_of(fields, base.num_layers, lambda _: False, LINEAR, name, OLDER)
    mixer = mamba2_config(fields, base.activation)
    turns = fields.choice("position_embedding_type", "nope", ("nope", "rope")) == "rope"
    ropes = base.ropes if turns else (None,) * base.num_layers
    return replace(base, mixers=tuple(mixer if kind == LINEAR else None for kind in types), ropes=ropes)


def weights(config: ModelConfig) -> ParamMapping:
    """Gates and ups are in one tensor."""
    sparse = sparse_weights(config) if isinstance(config, MoeConfig) else None
    width = cast(DecoderConfig, config).intermediate_size

    def source(name: str) -> Source:
        if (part := mamba2_part(name, config, "mamba")) is not None:
            return part
        name = name.replace(".mixer.", ".mamba.")
        if sparse is not None:
            return sparse.source(name)
        layer, _, which = name.partition("mlp.")
        if not which:
            return Tensor(name)
        if which.startswith("down_proj"):
            return Tensor(f"{layer}shared_mlp.output_linear.weight")
        start = 0 if which.startswith("gate_proj") else width
        return Part(Tensor(f"{layer}shared_mlp.input_linear.weight"), start, 2 * width)

    return ParamMapping(source, ignored=IGNORED)


ARCHITECTURE = Architecture(parse, GraniteMoeHybridForCausalLM, weights)
