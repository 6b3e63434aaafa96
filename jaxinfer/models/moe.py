"""What decoders with mixtures of experts share: their configuration, and Llama's layer with experts for its MLP."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import jax
from flax import nnx
from jax.typing import DTypeLike

from jaxinfer.attention import ForwardBatch
from jaxinfer.layers.experts import SparseMLP
from jaxinfer.layers.mlp import ClampedSwiGLU
from jaxinfer.layers.router import Routing
from jaxinfer.models.causal import SmoothingPairs
from jaxinfer.models.config import ConfigReader, ModelConfig, listed_layers
from jaxinfer.models.decoder import IGNORED, DecoderConfig, DecoderForCausalLM, DecoderLayer
from jaxinfer.models.sources import OneOf, Part, Source, Stack, Tensor, Transposed
from jaxinfer.models.weights import ParamMapping, spelled

STACKED = re.compile(r"(.*\.experts)\.(gate_proj|up_proj|down_proj)\.(?:weight|bias)")
MAX_EXPERTS = 4096


@dataclass(frozen=True)
class MoeConfig(DecoderConfig):
    """What shapes a decoder with experts.

    routing: how tokens get to them.
    expert_size: the width of each.
    expert_gating: what their gates do, where it is not by the activation.
    expert_bias: their linears have one.
    sparse: of each layer, whether it has them; the others have an MLP.
    shared_size: the width of an MLP that all tokens take besides; 0: there is none.
    shared_gate: which has a gate for each token.
    mtp_layers: how many layers that predict more than the next token come after the others, and are left aside.
    """

    routing: Routing = dataclasses.field(kw_only=True)
    expert_size: int = dataclasses.field(kw_only=True)
    expert_gating: ClampedSwiGLU | None = None
    expert_bias: bool = False
    sparse: tuple[bool, ...] = dataclasses.field(kw_only=True)
    shared_size: int = 0
    shared_gate: bool = False
    mtp_layers: int = 0


def moe_config(base: DecoderConfig, **more: Any) -> MoeConfig:
    """Of a decoder, with experts: see MoeConfig."""
    return base.extended(MoeConfig, **{"experts_per_token": more["routing"].top_k} | more)


def routing_of(fields: ConfigReader, experts: tuple[str, int], top_k: int, **more: Any) -> Routing:
    """Reads how many experts there are and how many a token goes to. experts: the field and its default; top_k: the
    other's; more: see Routing."""
    fields.refuse("scoring_func", more.get("scores", "softmax"))  # which only families' own code reads
    names = (experts[0], "num_local_experts", "num_experts")
    name = next((name for name in names if fields.data.get(name) is not None), names[0])
    count = fields.integer(name, experts[1], maximum=MAX_EXPERTS)
    chosen = fields.integer("num_experts_per_tok", top_k)
    if chosen > count:
        raise fields.error("num_experts_per_tok", f"it must be at most {fields.named(name)}")
    return Routing(count, chosen, **more)


def grouped_routing(fields: ConfigReader) -> Routing:
    """DeepSeek-V3's: sigmoids, to which a bias is added for the choice among the best groups."""
    fields.refuse("scoring_func", "sigmoid", "noaux_tc")
    fields.refuse("topk_method", "noaux_tc")
    experts = next((n for n in ("num_local_experts", "num_experts") if fields.data.get(n)), "n_routed_experts")
    count = fields.integer(experts, maximum=MAX_EXPERTS)
    groups = fields.integer("n_group", 1)
    if count % groups or count // groups < 2:
        raise fields.error("n_group", f"it must divide {fields.named(experts)}, into groups of two and more")
    kept = fields.integer("topk_group", 1)
    chosen = fields.integer("num_experts_per_tok")
    if kept > groups:
        raise fields.error("topk_group", f"it must be at most {fields.named('n_group')}")
    if chosen > kept * (count // groups):
        raise fields.error(
            "num_experts_per_tok", f"{fields.named('topk_group')}, leaves {kept * (count // groups)} experts"
        )
    return Routing(
        count,
        chosen,
        scores="sigmoid",
        bias=True,
        groups=groups,
        groups_kept=kept,
        group_best=2,
        normalized=fields.boolean("norm_topk_prob", False),
        scale=fields.number("routed_scaling_factor", 1.0),
    )


def sparse_layers(fields: ConfigReader, layers: int) -> tuple[bool, ...]:
    """Each `decoder_sparse_step`-th layer has experts, but for those in `mlp_only_layers`."""
    step, dense = fields.integer("decoder_sparse_step", 1), listed_layers(fields, "mlp_only_layers", layers) or ()
    return tuple((i + 1) % step == 0 and i not in dense for i in range(layers))


def sparse_mlp(config: MoeConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> SparseMLP:
    """A layer's."""
    return SparseMLP(
        config.hidden_size,
        config.expert_size,
        routing=config.routing,
        activation=config.activation,
        gating=config.expert_gating,
        bias=config.expert_bias,
        shared=config.shared_size,
        shared_gate=config.shared_gate,
        shared_bias=config.mlp_bias,
        dtype=dtype,
        rngs=rngs,
    )


class SparseLayer(DecoderLayer):
    """Attention, then experts, each behind a norm and added to the hidden states."""

    SMOOTHING_PAIRS: SmoothingPairs = (
        ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("self_attn.v_proj", ("self_attn.o_proj",)),
    )
    make_mlp = staticmethod(sparse_mlp)

    def feed_forward(self, x: jax.Array, batch: ForwardBatch) -> jax.Array:
        """Padding goes to no expert."""
        return self.mlp(x, batch.live)


def sparse_or_dense(config: MoeConfig, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> DecoderLayer:
    """A layer."""
    return (SparseLayer if config.sparse[layer] else DecoderLayer)(config, layer, dtype=dtype, rngs=rngs)


class MoeForCausalLM(DecoderForCausalLM):
    """A decoder with experts, and its head."""

    layer = staticmethod(sparse_or_dense)


def apart(experts: str, which: str, count: int, names: Mapping[str, str] | None = None) -> Source:
    """A weight of all experts, of which each has a tensor. experts: what names begin with; names: how parts of them are
    spelled."""
    each = (f"{experts}.{i}.{which}.weight" for i in range(count))
    return Stack(tuple(Tensor(spelled(name, names or {})) for name in each))


def packed(experts: str, which: str, size: int, turned: bool = False) -> Source:
    """The same in one tensor, with gates before ups. size: the width of each expert. turned: it is [E, in, out]."""

    def whole(name: str) -> Source:
        return Transposed(Tensor(name)) if turned else Tensor(name)

    if which == "down_proj":
        return whole(f"{experts}.down_proj")
    return Part(whole(f"{experts}.gate_up_proj"), size if which == "up_proj" else 0, 2 * size, axis=1)


def experts_apart(names: Mapping[str, str] | None = None) -> Callable[[ModelConfig], ParamMapping]:
    """Of checkpoints that have experts one by one; or in one tensor, under the names that they have here, as in
    transformers 5; or each of the three weights stacked, as in MLX. names: how parts of names are spelled."""
    spell = names or {}

    def weights(config: ModelConfig) -> ParamMapping:
        moe = cast(MoeConfig, config)

        def source(name: str) -> Source:
            if (match := STACKED.fullmatch(name)) is None:
                usual, own = Tensor(spelled(name, spell)), Tensor(name)
                return usual if usual == own else OneOf((usual, own))
            experts, which = match[1], match[2]
            block = spelled(f"{experts}.", spell).removesuffix("experts.")
            of_mlx = Tensor(f"{block}switch_mlp.{which}.weight")
            ours = packed(experts, which, moe.expert_size)
            return OneOf((apart(experts, which, moe.routing.experts, spell), ours, of_mlx))

        beyond = range(config.num_layers, config.num_layers + moe.mtp_layers)
        return ParamMapping(source, ignored=(*IGNORED, *(rf"layers\.{i}\..*" for i in beyond)))

    return weights
