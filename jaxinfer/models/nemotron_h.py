"""Nemotron-H, and Nemotron 2 and 3 Nano and Super (NVIDIA, arXiv:2504.03624): each layer is one of Mamba-2, attention
without positions, an MLP, or experts, perhaps in a space of fewer features; MLPs have no gates."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import jax
from flax import nnx
from jax.typing import DTypeLike

from jaxinfer.attention import ForwardBatch
from jaxinfer.cache import LayerCache
from jaxinfer.layers.attention import Angles
from jaxinfer.layers.experts import Experts
from jaxinfer.layers.linear import Linear
from jaxinfer.layers.mamba2 import Mamba2Config
from jaxinfer.layers.mlp import ACTIVATIONS, MLP
from jaxinfer.layers.router import Router, Routing
from jaxinfer.models.causal import SmoothingPairs
from jaxinfer.models.config import FULL, LINEAR, MAX_LAYERS, ConfigReader, ModelConfig
from jaxinfer.models.decoder import (
    DecoderConfig,
    DecoderForCausalLM,
    decoder_config,
    plain_mlp,
    self_attention,
    wide_rms_norm,
)
from jaxinfer.models.mamba2 import NAMES
from jaxinfer.models.moe import STACKED, apart, grouped_routing
from jaxinfer.models.registry import Architecture
from jaxinfer.models.sources import OneOf, Source, Tensor
from jaxinfer.models.state_space import CONTEXT, MAMBA2, OLDER, groups_of, mamba2_part
from jaxinfer.models.weights import ParamMapping, spelled
from jaxinfer.weights import Axes

MOE, DENSE = "moe", "mlp"  # in layers_block_type
SPELLINGS = {  # older ones
    "n_groups": "mamba_n_groups",
    "conv_kernel": "mamba_d_conv",
    "time_step_min": "mamba_dt_min",
    "use_conv_bias": "mamba_conv_bias",
}
PATTERN = {"M": LINEAR, "*": FULL, "-": DENSE, "E": MOE}


@dataclass(frozen=True)
class NemotronHConfig(DecoderConfig):
    """What shapes Nemotron-H.

    kinds: of each layer.
    routing: how tokens get to experts, where there are some.
    expert_size, shared_size: the widths of each, and of the MLP that all tokens take.
    latent_size: features of what experts take and make; None: those of hidden states.
    """

    kinds: tuple[str, ...] = field(kw_only=True)
    routing: Routing | None = None
    expert_size: int = 0
    shared_size: int = 0
    latent_size: int | None = None


class LatentExperts(nnx.Module):
    """Experts of what hidden states are projected to, and an MLP of these."""

    def __init__(self, config: NemotronHConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        routing, hidden, latent = cast(Routing, config.routing), config.hidden_size, config.latent_size
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}

        def latent_proj(size: int, to: int, axes: Axes) -> Linear | None:
            return None if latent is None else Linear(size, to, axes=axes, bias=config.mlp_bias, **options)

        self.gate = Router(hidden, routing, **options)
        self.experts = Experts(
            latent or hidden,
            config.expert_size,
            routing=routing,
            gating=ACTIVATIONS[config.activation],
            gated=False,
            **options,
        )
        self.shared_experts = MLP(
            hidden, config.shared_size, activation=config.activation, bias=config.mlp_bias, **options
        )
        self.fc1_latent_proj = latent_proj(hidden, latent or 0, (None, "embed"))
        self.fc2_latent_proj = latent_proj(latent or 0, hidden, ("embed", None))

    def __call__(self, x: jax.Array, live: jax.Array) -> jax.Array:
        experts, shares = self.gate(x)
        latent = x if self.fc1_latent_proj is None else self.fc1_latent_proj(x)
        out = self.experts(latent, experts, shares, live).astype(x.dtype)
        out = out if self.fc2_latent_proj is None else self.fc2_latent_proj(out)
        return out + self.shared_experts(x)


class Block(nnx.Module):
    """A layer of one kind behind a norm, added to the hidden states."""

    SMOOTHING_PAIRS: ClassVar[SmoothingPairs] = ()

    def __init__(self, config: NemotronHConfig, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm = wide_rms_norm(config, dtype)
        self.mixer = self.make(config, layer, dtype=dtype, rngs=rngs)

    def make(self, config: NemotronHConfig, layer: int, **options: Any) -> Any:
        """What is behind the norm."""
        return LatentExperts(config, **options)

    def __call__(
        self, x: jax.Array, angles: Angles, cache: LayerCache | None, batch: ForwardBatch
    ) -> tuple[jax.Array, LayerCache | None]:
        return x + self.mixer(self.norm(x), batch.live), cache


class MLPBlock(Block):
    """An MLP."""

    SMOOTHING_PAIRS = (("norm", ("mixer.up_proj",)),)

    def make(self, config: NemotronHConfig, layer: int, **options: Any) -> MLP:
        return plain_mlp(config, **options)

    def __call__(
        self, x: jax.Array, angles: Angles, cache: LayerCache | None, batch: ForwardBatch
    ) -> tuple[jax.Array, LayerCache | None]:
        return x + self.mixer(self.norm(x)), cache


class MambaBlock(Block):
    """Mamba-2."""

    SMOOTHING_PAIRS = (("norm", tuple(f"mixer.{name}" for name in MAMBA2)),)

    def make(self, config: NemotronHConfig, layer: int, **options: Any) -> Any:
        return cast(Mamba2Config, config.mixers[layer]).module(config.hidden_size, eps=config.norm_eps, **options)

    def __call__(
        self, x: jax.Array, angles: Angles, cache: LayerCache | None, batch: ForwardBatch
    ) -> tuple[jax.Array, LayerCache | None]:
        mixed, cache = self.mixer(self.norm(x), cache, batch)
        return x + mixed, cache


class AttentionBlock(Block):
    """Attention."""

    SMOOTHING_PAIRS = (
        ("norm", ("mixer.q_proj", "mixer.k_proj", "mixer.v_proj")),
        ("mixer.v_proj", ("mixer.o_proj",)),
    )

    def make(self, config: NemotronHConfig, layer: int, **options: Any) -> Any:
        return self_attention(config, layer, **options)

    def __call__(
        self, x: jax.Array, angles: Angles, cache: LayerCache | None, batch: ForwardBatch
    ) -> tuple[jax.Array, LayerCache | None]:
        attended, cache = self.mixer(self.norm(x), angles, cache, batch)
        return x + attended, cache


BLOCKS = {LINEAR: MambaBlock, FULL: AttentionBlock, DENSE: MLPBlock, MOE: Block}


def block(config: NemotronHConfig, layer: int, **options: Any) -> Block:
    """A layer."""
    return BLOCKS[config.kinds[layer]](config, layer, **options)


class NemotronHForCausalLM(DecoderForCausalLM):
    """Nemotron-H with its head."""

    layer = staticmethod(block)
    norm = staticmethod(wide_rms_norm)


def kinds_of(fields: ConfigReader) -> tuple[str, ...]:
    """Of each layer: by `layers_block_type`, or a letter each in `hybrid_override_pattern`."""
    name = next((n for n in ("layers_block_type", "layer_types") if fields.data.get(n) is not None), "")
    kinds = fields.data.get(name)
    if not name:
        name, pattern = "hybrid_override_pattern", fields.data.get("hybrid_override_pattern", "ME*-")
        kinds = [PATTERN.get(letter, letter) for letter in pattern] if isinstance(pattern, str) else pattern
    if not isinstance(kinds, list) or not 1 <= len(kinds) <= MAX_LAYERS:
        raise fields.error(name, f"it must have a kind for each layer, of {MAX_LAYERS} at most")
    kinds = [OLDER.get(kind, kind) if isinstance(kind, str) else kind for kind in kinds]
    if unknown := sorted({str(kind) for kind in kinds} - BLOCKS.keys()):
        raise fields.error(name, f"{', '.join(unknown)} is not supported, only {', '.join(BLOCKS)}")
    if not {LINEAR, FULL} & {*kinds}:
        raise fields.error(name, f"no layer keeps anything of a sequence; one at least must be {LINEAR} or {FULL}")
    if fields.data.get("num_hidden_layers") not in (None, len(kinds)):
        raise fields.error("num_hidden_layers", f"{name} has {len(kinds)} kinds, one for each layer")
    return tuple(kinds)


def parse(fields: ConfigReader) -> NemotronHConfig:
    """Time steps are at least `time_step_min`, as transformers has it, whatever `time_step_limit` says."""
    kinds = kinds_of(fields)
    spelling = {name: old if old in fields.data else name for name, old in SPELLINGS.items()}
    absent = {"max_position_embeddings": CONTEXT, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 21504}
    fields = fields.with_absent(**absent).with_values(num_hidden_layers=len(kinds))
    base = decoder_config(
        fields,
        activation_field="mlp_hidden_act",
        default_activation="relu2",
        norm_eps=("layer_norm_epsilon", 1e-5),
        mlp_bias=fields.boolean("mlp_bias", False),
        ropes=(None,) * len(kinds),
        max_context=fields.integer("max_position_embeddings"),
    )
    heads = fields.integer("mamba_num_heads", 128)
    bias = fields.boolean("use_bias", False)
    mixer = Mamba2Config(
        heads=heads,
        head_dim=fields.integer("mamba_head_dim", 64),
        groups=groups_of(fields, spelling["n_groups"], 8, "mamba_num_heads", heads),
        state_size=fields.integer("ssm_state_size", 128),
        width=fields.integer(spelling["conv_kernel"], 4, minimum=2),
        activation=fields.choice("mamba_hidden_act", "silu", tuple(ACTIVATIONS)),
        conv_bias=fields.boolean(spelling["use_conv_bias"], True),
        in_bias=bias,
        out_bias=bias,
        limits=(fields.number(spelling["time_step_min"], 0.001, above=False), float("inf")),
    )
    mixers = tuple(mixer if kind == LINEAR else None for kind in kinds)
    experts = experts_of(fields) if MOE in kinds else {}
    return base.extended(NemotronHConfig, mixers=mixers, kinds=kinds, **experts)


def experts_of(fields: ConfigReader) -> dict[str, Any]:
    """What NemotronHConfig says of experts."""
    routing = grouped_routing(fields.with_defaults(n_routed_experts=8, num_experts_per_tok=2, norm_topk_prob=True))
    return {
        "experts_per_token": routing.top_k,
        "routing": routing,
        "expert_size": fields.integer("moe_intermediate_size", 7688),
        "shared_size": fields.integer("moe_shared_expert_intermediate_size", 7688),
        "latent_size": None if fields.data.get("moe_latent_size") is None else fields.integer("moe_latent_size"),
    }


def weights(config: ModelConfig) -> ParamMapping:
    """Experts are one by one, or stacked."""
    routing = cast(NemotronHConfig, config).routing

    def source(name: str) -> Source:
        own = spelled(name, NAMES)
        if (part := mamba2_part(own, config, "mixer")) is not None:
            return part
        if (match := STACKED.fullmatch(own)) and routing is not None:
            each = apart(match[1], match[2], routing.experts)
            return OneOf((each, Tensor(f"{match[1]}.{match[2]}")))
        return Tensor(own)

    return ParamMapping(
        source, "backbone.", embedding="backbone.embeddings.weight", prefixes=("model.", ""), beside=(r"mtp\..+",)
    )


ARCHITECTURE = Architecture(parse, NemotronHForCausalLM, weights)
