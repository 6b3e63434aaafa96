"""Which legal values each field of the families' configuration classes in transformers may have, at random.

Values of one field are taken in turn, in an order of their own, so a few cases have several of each. ABSENT is one.
Which combinations are legal is for transformers to say: see random_fields.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

TOKENS = 30
ABSENT = object()
FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"

# Fields that change nothing of what is computed for a text, and why; they are drawn all the same.
OF_TRAINING = "of training, or of initial weights"
OF_GENERATION = "of generation, which requests and generation_config.json say"
OF_IMAGES = "of images, which are not read"
INERT = {
    **dict.fromkeys(
        ("attention_dropout", "hidden_dropout", "classifier_dropout", "residual_dropout", "embedding_dropout"),
        OF_TRAINING,
    ),
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "layerdrop"), OF_TRAINING),
    **dict.fromkeys(("initializer_range", "init_std"), OF_TRAINING),
    **dict.fromkeys(("router_aux_loss_coef", "router_jitter_noise", "output_router_logits"), OF_TRAINING),
    "input_jitter_noise": OF_TRAINING,
    "num_mtp_layers": "of layers that predict more tokens, which are left aside",
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "eod_token_id", "use_cache"), OF_GENERATION),
    "sep_token_id": OF_GENERATION,
    "pretraining_tp": "transformers 5 reads it no more",
    "reorder_and_upcast_attn": "scores are always float32",
    "is_decoder": "transformers reads it nowhere",
    **dict.fromkeys(("summary_type", "summary_use_proj", "summary_activation"), "of another head"),
    **dict.fromkeys(("summary_proj_to_labels", "summary_first_dropout"), "of another head"),
    **dict.fromkeys(("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"), OF_IMAGES),
    **dict.fromkeys(("time_step_max", "time_step_scale", "time_step_init_scheme", "time_step_floor"), OF_TRAINING),
    **dict.fromkeys(("rescale_prenorm_residual", "z_loss_coefficient"), OF_TRAINING),
    "residual_in_fp32": "float32 is that",
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), "of how it is computed"),
    **dict.fromkeys(("use_mambapy", "use_associative_scan", "use_mamba_kernels"), "of how it is computed"),
    "mamba_ssm_cache_dtype": "states are float32",
    "moe_shared_expert_overlap": "of how it is computed",
    "num_logits_to_keep": OF_GENERATION,
    **dict.fromkeys(("num_nextn_predict_layers", "mtp_layers_block_type"), "layers that predict more tokens"),
    **dict.fromkeys(("boi_token_index", "eoi_token_index", "image_token_index"), OF_IMAGES),
    **dict.fromkeys(("boi_token_id", "eoi_token_id", "boa_token_id", "eoa_token_index", "audio_token_id"), OF_IMAGES),
}
# Of single families: fields of their class that their model in transformers doesn't read.
UNREAD: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("mamba", "falcon_mamba"), ("time_step_min",)),
    "mamba2": ("time_step_min", "time_step_rank"),
    "nemotron_h": (
        *("attention_bias", "mamba_proj_bias", "sliding_window"),
        *("expand", "n_shared_experts", "time_step_limit"),
    ),
}
# As INERT, but with one value: others need a tower that fits.
FIXED = dict.fromkeys(
    (
        "vision_config",
        "audio_config",
        "mm_tokens_per_image",
        "projector_hidden_act",
        "vision_feature_layer",
        "multimodal_projector_bias",
        "spatial_merge_size",
    ),
    OF_IMAGES,
)

# All of transformers; prelu and xielu have parameters of their own.
ACTIVATIONS = (
    *("gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh"),
    *("gelu_pytorch_tanh", "hardswish", "laplace", "leaky_relu", "linear", "mish", "prelu", "quick_gelu", "relu"),
    *("relu2", "relu6", "sigmoid", "silu", "sqrtsoftplus", "swish", "tanh", "xielu"),
)
EPSILONS = (ABSENT, 1e-6, 1e-5, 1e-12, 1e-3, 0.1, 0.0)
FACTORS = (ABSENT, 0.3, 1.0, 1.7)
RATES = (ABSENT, 0.0, 0.3)
IDS = (ABSENT, 0, 7)


@dataclasses.dataclass(frozen=True)
class Case:
    """One of a family's; index: which one."""

    family: str
    index: int

    def pick(self, name: str, options: Sequence[Any]) -> Any:
        """One of the options: in as many cases as there are, each once."""
        turn, place = divmod(self.index, len(options))
        return random.Random(f"{self.family} {name} {turn} {len(options)}").sample(options, len(options))[place]

    def rng(self, name: str) -> random.Random:
        return random.Random(f"{self.family} {name} {self.index}")


def _hidden_sizes(heads: int) -> Sequence[int]:
    """Not many that heads don't divide: many classes allow none."""
    return (24, 48, 32) if 32 % heads == 0 else (24, 48, 24, 48, 32)


def _key_value_heads(case: Case, fields: dict[str, Any]) -> Any:
    heads = fields["num_attention_heads"]
    return case.pick("num_key_value_heads", [n for n in range(1, heads + 1) if heads % n == 0])


def _layer_types(case: Case, fields: dict[str, Any]) -> Any:
    """Some slide, where there is a window; or they have chunks."""
    name, other = next(
        pair for pair in (("attention_chunk_size", CHUNKED), ("sliding_window", SLIDING)) if pair[0] in fields
    )
    used = fields[name] is not None and fields.get("use_sliding_window", True) is True
    if case.pick("layer_types", (True, True, False)) or (other == SLIDING and fields[name] is None):
        return case.rng("layer_types").choices((FULL, other if used else FULL), k=fields["num_hidden_layers"])
    return ABSENT


def _shared_layers(case: Case, fields: dict[str, Any]) -> Any:
    """Those before them have each type of layer."""
    layers, types = fields["num_hidden_layers"], fields["layer_types"]
    if types is ABSENT or types is None:
        return case.pick("num_kv_shared_layers", (ABSENT, 0))
    types = [*types[:-1], FULL]
    fitting = [n for n in range(layers) if set(types[: layers - n]) == set(types)]
    return case.rng("num_kv_shared_layers").choice((ABSENT, *fitting))


def _of_layers(*options: int) -> Callable[[Case, dict[str, Any]], Any]:
    """One for all layers, or one for each."""

    def values(case: Case, fields: dict[str, Any]) -> Any:
        layers = fields["num_hidden_layers"]
        return case.pick("per layer", (*options, case.rng("per layer").choices(options, k=layers)))

    return values


def _no_rope_layers(case: Case, fields: dict[str, Any]) -> Any:
    if case.pick("no_rope_layers", (True, False)):
        return case.rng("no_rope_layers").choices((0, 1), k=fields["num_hidden_layers"])
    return ABSENT


def _kinds(*kinds: str, given: bool = False) -> Callable[[Case, dict[str, Any]], Any]:
    """Any of these for each layer. given: something is always said."""

    def values(case: Case, fields: dict[str, Any]) -> Any:
        if not given and case.pick("layer_types", (0, 0, 1)):
            return ABSENT
        return case.rng("layer_types").choices(kinds, k=fields.get("num_hidden_layers", 3))

    return values


def _kept_kinds(case: Case, fields: dict[str, Any]) -> Any:
    """One layer at least keeps something of a sequence."""
    kinds = _kinds(LINEAR, FULL, "moe", "mlp", given=True)(case, fields)
    return kinds if {LINEAR, FULL} & {*kinds} else [*kinds[:-1], LINEAR]


def _convolutions(case: Case, fields: dict[str, Any]) -> Any:
    """What `full_attn_idxs` says, where that is there too."""
    types, full = _kinds("conv", FULL)(case, fields), fields["full_attn_idxs"]
    if types is ABSENT or full is ABSENT or full is None:
        return types
    return [FULL if i in full else "conv" for i in range(len(types))]


def _moe_layers(case: Case, fields: dict[str, Any]) -> Any:
    listed = case.pick("moe_layers", (ABSENT, [], [0], [2, 1]))
    return listed if listed is ABSENT else [i for i in listed if i < fields["num_hidden_layers"]]


def _some_layers(case: Case, fields: dict[str, Any]) -> Any:
    layers = fields["num_hidden_layers"]
    return case.pick("some layers", (ABSENT, [0], [layers - 1], list(range(layers))))


def _mamba_heads(case: Case, fields: dict[str, Any]) -> Any:
    """As many as the other sizes leave."""
    inner = fields.get("mamba_d_ssm") or fields.get("mamba_expand", fields.get("expand", 1)) * fields["hidden_size"]
    size = fields.get("mamba_d_head", fields.get("head_dim"))
    return inner // size if isinstance(size, int) else case.pick("mamba heads", (2, 4))


def _period(which: str) -> Callable[[Case, dict[str, Any]], Any]:
    return lambda case, fields: fields[f"{which}_layer_offset"] + case.pick(which, (1, 2))


LINEAR = "linear_attention"
Values = Sequence[Any] | Callable[[Case, dict[str, Any]], Any]
# Of encoders alone.
ENCODER_VALUES: dict[str, Values] = {
    "n_heads": (4, 2, 3),
    "dim": (24, 48),
    "n_layers": (2, 1, 3),
    "hidden_dim": (40, 16, 57),
    "embedding_size": (16, 24, 9),
    "num_hidden_groups": lambda case, fields: case.pick("groups", range(1, fields["num_hidden_layers"] + 1)),
    "inner_group_num": (1, 2),
    "type_vocab_size": (2, 1, 3),
    "relative_attention_num_buckets": (ABSENT, 32, 40),
    "max_relative_positions": (ABSENT, -1, 7, 40),
    "pos_att_type": (["p2c", "c2p"], ABSENT, ["c2p"], "p2c|c2p", [], ["p2c"]),
    "local_attention": (8, 3, 1, ABSENT, 40),
    "norm_eps": EPSILONS,
    "classifier_pooling": ("mean", ABSENT, "cls"),
    **dict.fromkeys(("activation", "pooler_hidden_act", "classifier_activation"), (ABSENT, *ACTIVATIONS)),
    **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout_prob"), RATES),
    **dict.fromkeys(("mlp_dropout", "qa_dropout", "seq_classif_dropout", "pooler_dropout"), RATES),
    "summary_last_dropout": RATES,
    "initializer_cutoff_factor": (ABSENT, 1.0),
    "sparse_pred_ignore_index": (ABSENT, -1),
    **dict.fromkeys(("mask_token_id", "cls_token_id"), IDS),
}
# By name, for all families; None is one more where the class says so. Functions take what was drawn before.
VALUES: dict[str, Values] = {
    "n_embd": (24, 48, 36),
    "hidden_size": lambda case, fields: case.pick("hidden_size", _hidden_sizes(fields.get("num_attention_heads", 2))),
    **dict.fromkeys(("num_attention_heads", "n_head"), (4, 2, 6, 3, 1)),
    **dict.fromkeys(("num_hidden_layers", "n_layer"), (2, 3, 1)),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "intermediate_size_mlp"), (40, 16, 8, 57)),
    "n_inner": (ABSENT, 40, 57),
    "vocab_size": (97, 40, 128),
    "num_key_value_heads": _key_value_heads,
    "head_dim": (ABSENT, 8, 12, 16, 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), (64, 32, 100, ABSENT)),
    "original_max_position_embeddings": (ABSENT, 32, 64),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"), EPSILONS),
    **dict.fromkeys(("hidden_act", "hidden_activation", "activation_function"), (ABSENT, *ACTIVATIONS)),
    **dict.fromkeys(("sliding_window", "attention_chunk_size"), (ABSENT, 5, 9, 20, 1, 4096)),
    "sliding_window_pattern": (ABSENT, 1, 2, 3, "LG"),
    "max_window_layers": (ABSENT, 0, 1, 2),
    "layer_types": _layer_types,
    "no_rope_layers": _no_rope_layers,
    "no_rope_layer_interval": (ABSENT, 1, 2, 3),
    "query_pre_attn_scalar": (ABSENT, 1, 6, 16),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), (ABSENT, 0.5, 3.0)),
    **dict.fromkeys(("logit_scale", "embedding_multiplier", "logits_scaling", "residual_multiplier"), FACTORS),
    "attention_multiplier": FACTORS,
    "attn_scale": (ABSENT, 0.0, 0.7, 2.5),
    "floor_scale": (ABSENT, 1, 7),
    **dict.fromkeys(("num_experts", "num_local_experts"), (4, 6, 5)),
    "swiglu_alpha": (ABSENT, 0.5, 1.702, 3.0),
    "swiglu_limit": (ABSENT, 0.3, 7.0),
    "num_experts_per_tok": (1, 2, 3, 4),
    "n_routed_experts": (4, 8, 6),
    "moe_num_experts": (4, 6, 5),
    "moe_k": (1, 2, 3, 4),
    "moe_topk": _of_layers(1, 2, 4),
    "moe_num_shared_experts": (0, 1, 2),
    "moe_layer_start_index": (ABSENT, 0, 1),
    "moe_layer_end_index": (ABSENT, -1, 0, 1),
    "moe_layer_interval": (ABSENT, 1, 2),
    "moe_norm_min": (ABSENT, 1e-12, 0.5),
    "shared_intermediate_size": (0, 24, 40),
    "n_shared_experts": (1, 2),
    "n_group": (1, 2, 1),
    "topk_group": lambda case, fields: case.pick("topk_group", range(1, fields["n_group"] + 1)),
    "first_k_dense_replace": (0, 1, 2),
    "num_mtp_layers": (ABSENT, 0, 1),
    "routed_scaling_factor": FACTORS,
    "moe_intermediate_size": (16, 8, 41),
    "shared_expert_intermediate_size": (24, 40),
    **dict.fromkeys(("decoder_sparse_step", "interleave_moe_layer_step"), (ABSENT, 1, 2, 3)),
    "moe_layers": _moe_layers,
    "mlp_only_layers": (ABSENT, [], [0]),
    **dict.fromkeys(("router_aux_loss_coef", "router_jitter_noise", "input_jitter_noise"), RATES),
    "clip_qkv": (ABSENT, 0.3, 1.5),
    "global_head_dim": (16, 8, 12),
    "num_global_key_value_heads": (ABSENT, 1, None),
    "num_kv_shared_layers": _shared_layers,
    "hidden_size_per_layer_input": (8, 0, 5),
    "vocab_size_per_layer_input": lambda case, fields: fields["vocab_size"] + case.pick("vocab_per_layer", (0, 3)),
    "top_k_experts": (1, 2, 3, 4),
    "word_embed_proj_dim": (ABSENT, 16, 33),
    **dict.fromkeys(("linear_conv_kernel_dim", "conv_L_cache", "conv_kernel", "mamba_d_conv"), (4, 2, 3)),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_head_dim"), (8, 4, 12)),
    "linear_num_key_heads": (2, 1),
    "linear_num_value_heads": (2, 4),
    **dict.fromkeys(("norm_eps", "mixer_rms_eps"), EPSILONS),
    "block_multiple_of": (8, 1, 7),
    "block_ffn_dim_multiplier": FACTORS,
    **dict.fromkeys(("full_attn_idxs", "attn_layer_indices"), _some_layers),
    "num_dense_layers": (0, 1, 2),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), (6, 1, 5)),
    **dict.fromkeys(("expand", "mamba_expand"), (2, 1, 3)),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank"), (ABSENT, "auto", 1, 5)),
    **dict.fromkeys(("num_heads", "mamba_n_heads"), _mamba_heads),
    "mamba_num_heads": (4, 8),
    "mamba_d_head": ("auto", 4, 8),
    "mamba_d_ssm": (48, 96, None),
    **dict.fromkeys(("n_groups", "mamba_n_groups"), (1, 2)),
    "time_step_limit": (ABSENT, [0.3, 0.9], [0.0, 2.0]),
    **dict.fromkeys(("time_step_min", "time_step_max", "time_step_scale", "time_step_floor"), (ABSENT, 0.2, 0.5)),
    "time_step_init_scheme": (ABSENT, "constant"),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), (16, 4, 256)),
    **dict.fromkeys(("expert_layer_offset", "attn_layer_offset"), (0, 1)),
    "expert_layer_period": _period("expert"),
    "attn_layer_period": _period("attn"),
    "num_logits_to_keep": (1, 3),
    "z_loss_coefficient": RATES,
    **{f"{name}_multiplier": FACTORS for name in ("lm_head", "key", "attention_out", "attention_in")},
    **{f"ssm_{name}_multiplier": FACTORS for name in ("in", "out")},
    "mlp_multipliers": (ABSENT, [0.6, 0.8], [1.2, 1.7]),
    "ssm_multipliers": (ABSENT, [0.5, 1.3, 0.8, 0.7, 1.4]),
    "position_embedding_type": (ABSENT, "rope"),
    "layers_block_type": _kept_kinds,
    **dict.fromkeys(("mlp_hidden_act", "mamba_hidden_act"), (ABSENT, *ACTIVATIONS)),
    "mamba_ssm_cache_dtype": (ABSENT, "bfloat16"),
    "moe_shared_expert_intermediate_size": (24, 40),
    "moe_latent_size": (ABSENT, 12, 20),
    "num_nextn_predict_layers": (ABSENT, 1),
    "mtp_layers_block_type": (ABSENT, [FULL, "moe"]),
    **{name: RATES for name in INERT if "drop" in name or name in ("initializer_range", "init_std")},
    **{name: IDS for name in INERT if name.endswith(("_token_id", "_token_index"))},
    "eos_token_id": (*IDS, [3, 5]),
    "pad_token_id": (0, 7),  # the default is outside of a small vocabulary
    "pretraining_tp": (ABSENT, 1, 2),
    **ENCODER_VALUES,
    "summary_type": (ABSENT, "first", "mean"),
    "summary_activation": (ABSENT, "tanh"),
}
DELTA_NETS = ("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text")
MAMBA2 = ("bamba", "falcon_h1", "granitemoehybrid")
GEMMA4 = ("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text")
# Whatever the classes say, models compute with them.
NOT_NULL = {
    **dict.fromkeys(("num_experts", "top_k_experts", "moe_intermediate_size", "pad_token_id"), GEMMA4),
    "head_dim": ("glm", "hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"),
    "sliding_window": ("cohere2", "gemma2", "gemma3", "gemma3_text", "ministral", "olmo3"),
    "logit_scale": ("cohere",),
    "layer_norm_eps": ("cohere",),
    "max_window_layers": ("qwen2_vl", "qwen2_5_vl"),
    "image_token_index": ("gemma3",),
    **dict.fromkeys(
        ("num_experts_per_tok", "n_routed_experts", "n_shared_experts"),
        ("dots1", "granitemoe", "granitemoeshared", "granitemoehybrid"),
    ),
    **dict.fromkeys(("n_group", "first_k_dense_replace"), ("dots1",)),
    "num_local_experts": ("granitemoe", "granitemoeshared", "granitemoehybrid"),
    **dict.fromkeys(("embedding_multiplier", "logits_scaling"), ("granitemoe", "granitemoeshared", "granitemoehybrid")),
    **dict.fromkeys(
        ("residual_multiplier", "attention_multiplier"), ("granitemoe", "granitemoeshared", "granitemoehybrid")
    ),
    **dict.fromkeys(("moe_num_experts", "moe_k", "moe_num_shared_experts"), ("ernie4_5_moe",)),
    **dict.fromkeys(("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"), ("ernie4_5_moe",)),
    "moe_norm_min": ("ernie4_5_moe",),
    **dict.fromkeys(
        (
            *("mamba_d_state", "mamba_d_conv", "mamba_expand", "mamba_n_heads", "mamba_d_head", "mamba_n_groups"),
            *("mamba_chunk_size", "mamba_conv_bias", "mamba_proj_bias", "time_step_limit", "num_key_value_heads"),
            *("num_logits_to_keep", "z_loss_coefficient", "mamba_norm_before_gate", "mamba_rms_norm"),
            *("projectors_bias", "lm_head_multiplier", "key_multiplier", "attention_out_multiplier"),
            *("attention_in_multiplier", "ssm_in_multiplier", "ssm_out_multiplier", "mamba_d_ssm"),
        ),
        MAMBA2,
    ),
}
BOOL = (ABSENT, True, False)
# Of single families: which other values a field may have, and which fields there are besides those of the class.
OWN_VALUES: dict[tuple[str, str], Values] = {
    **{(family, "use_bidirectional_attention"): (ABSENT, "vision", "all", "vision") for family in GEMMA4},
    **{(family, "num_hidden_layers"): (3, 4, 2, 1) for family in GEMMA4},
    # With the defaults, of 256 and 512, scores are too large for exact results; a low cap leaves errors alone.
    **{(family, "head_dim"): (8, 12, 16, 4) for family in GEMMA4},
    **{(family, "final_logit_softcapping"): (ABSENT, 3.0, 20.0) for family in GEMMA4},
    **{(family, "moe_intermediate_size"): (16, 8, 24) for family in GEMMA4},  # what its grouped products can do
    **{(family, "layer_types"): _kinds(LINEAR, FULL) for family in (*DELTA_NETS, "granitemoehybrid")},
    **{(family, "head_dim"): (8, 16, 24) for family in DELTA_NETS},
    # Keys get length one, also those of which laplace cancels all digits but a few.
    **{(family, "hidden_act"): tuple(act for act in ACTIVATIONS if act != "laplace") for family in DELTA_NETS},
    ("lfm2", "layer_types"): _convolutions,
    ("lfm2_moe", "layer_types"): _kinds("conv", FULL, given=True),
    ("mamba2", "head_dim"): (4, 8, 2),
    ("jamba", "num_experts"): (4, 1, 5),
    ("granitemoehybrid", "num_local_experts"): (4, 0, 5),
    ("granitemoehybrid", "shared_intermediate_size"): (24, 40),
    # Of tokens that are placeholders the embedding is another's.
    **{(family, f"{kind}_token_id"): (ABSENT, 200) for family in GEMMA4 for kind in ("image", "video", "audio")},
}
OWN_VALUES |= {
    ("eurobert", "classifier_pooling"): (ABSENT, "late", "mean", "bos"),
    ("modernbert", "layer_types"): lambda case, fields: case.pick(
        "layer_types", (ABSENT, case.rng("layer_types").choices((FULL, SLIDING), k=fields["num_hidden_layers"]))
    ),
}
BESIDES = dict.fromkeys(GEMMA4, ("global_head_dim", "num_global_key_value_heads"))
