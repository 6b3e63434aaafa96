"""Every field of config.json that shapes a model, out of range: refused by name, before any weight is looked at."""

import json
import math
import re
import typing

import pytest

from jaxinfer import CheckpointError
from jaxinfer.models.registry import model_types, parse_config
from tests.checkpoints import BASE, GPT2, VARIANTS, rope
from tests.models.families import variants
from tests.models.field_draws import own_fields, text_class
from tests.models.field_values import FIXED, INERT, UNREAD
from tests.refusals import HUGE, refusal

COUNTS = [-1, 0, 1.5, True, math.nan, math.inf, "8", [8], 2**40, HUGE]
NUMBERS = [-1.0, 0, True, math.nan, math.inf, "1", [1], 1e300, 5e-324, HUGE]
FLAGS = [1, 0, "true", []]
NAMES = ["swish9", 1, ["silu"], True]
ROPE_FIELDS = {
    "linear": {"factor": NUMBERS},
    "dynamic": {"factor": NUMBERS},
    "llama3": {
        "factor": NUMBERS,
        "low_freq_factor": [*NUMBERS, 4.5],
        "high_freq_factor": [*NUMBERS, 0.9],
        "original_max_position_embeddings": COUNTS,
    },
    "yarn": {
        "factor": NUMBERS,
        "beta_fast": NUMBERS,
        "beta_slow": NUMBERS,
        "attention_factor": NUMBERS,
        "truncate": FLAGS,
        "original_max_position_embeddings": COUNTS,
    },
}
LLAMA_LIKE = {
    **dict.fromkeys(
        ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), COUNTS
    ),
    "num_key_value_heads": [*COUNTS, 3, 8],
    "max_position_embeddings": COUNTS,
    "head_dim": [*COUNTS, 7],
    "rms_norm_eps": NUMBERS,
    "hidden_act": NAMES,
    "tie_word_embeddings": FLAGS,
    "rope_parameters": [
        5,
        "default",
        {"rope_type": "longrope"},
        {"rope_type": 5},
        {"partial_rotary_factor": 0.5},
        {"mrope_section": [1, 1, 2]},
        {"full_attention": {"rope_type": "default"}},
        *({"rope_type": "default", "rope_theta": theta} for theta in [*NUMBERS, 1]),
    ],
    "rope_scaling": [{"type": "linear", "factor": 2.0}, [1]],  # beside the rope_parameters that is there
    "quantization_config": [{"quant_method": "quark"}, {"quant_method": "bitsandbytes", "load_in_4bit": "yes"}],
    "is_encoder_decoder": [True],
}
WINDOWED = {
    "sliding_window": COUNTS,
    "use_sliding_window": FLAGS,
    "max_window_layers": [*COUNTS[:1], *COUNTS[2:]],
    "layer_types": [["full_attention"], ["full_attention", "chunked_attention"], "full_attention", 2, []],
}
BAD_FIELDS = {
    "llama": LLAMA_LIKE | {"attention_bias": FLAGS, "mlp_bias": FLAGS},
    "mistral-window": LLAMA_LIKE | {"sliding_window": COUNTS, "layer_types": [["full_attention"] * 2]},
    "qwen2-window-tied": LLAMA_LIKE | WINDOWED,
    "qwen3-layer_types-bias": LLAMA_LIKE | WINDOWED | {"attention_bias": FLAGS},
    "gpt2": {
        **dict.fromkeys(("vocab_size", "n_embd", "n_layer", "n_head", "n_positions", "n_inner"), COUNTS),
        "layer_norm_epsilon": NUMBERS,
        "activation_function": NAMES,
        "scale_attn_weights": FLAGS,
        "scale_attn_by_inverse_layer_idx": FLAGS,
        "tie_word_embeddings": FLAGS,
        "add_cross_attention": [True],
        "quantization_config": [{}],
    },
}


@pytest.mark.parametrize(
    ("variant", "field"), [(variant, field) for variant, fields in BAD_FIELDS.items() for field in fields]
)
def test_config_fields(variant, field, tmp_path):
    model_type = variant.split("-")[0]
    good = VARIANTS[variant].fields | {"model_type": model_type}
    if model_type != "gpt2":
        good = rope("default") | good
    for value in BAD_FIELDS[variant][field]:
        (tmp_path / "config.json").write_text(json.dumps(good | {field: value}))
        # Head sizes and such are named by the field that they come from.
        text = refusal(tmp_path, "config.json")
        assert field in text or "head_dim" in text, (value, text)


@pytest.mark.parametrize(("kind", "field"), [(kind, field) for kind, fields in ROPE_FIELDS.items() for field in fields])
def test_rope_fields(kind, field, tmp_path):
    full = {"factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    for value in ROPE_FIELDS[kind][field]:
        fields = BASE | {"model_type": "llama"}
        new = fields | rope(kind, **full | {field: value})
        old = fields | {"rope_theta": 10000.0, "rope_scaling": {"type": kind, **full, field: value}}
        for spelling in (new, old):
            (tmp_path / "config.json").write_text(json.dumps(spelling))
            refusal(tmp_path, "config.json", field)


# Of fields of all families, by what their class says; some say 0, 1, 1.5, or null, and mean it.
BAD_VALUES = {
    int: [-1, True, math.nan, math.inf, "8", [8], HUGE],
    float: [-1.0, True, math.nan, math.inf, "1", [1], 1e300, 5e-324, HUGE],
    bool: ["true", [], 2],
    str: NAMES,
    list: [0, 2, {}, [True], "full_attention", ["chunked_attention"] * 2, []],
    dict: [5, "default", {"rope_type": 5}, {"rope_type": "default", "rope_theta": -1}],
}

# None, none, the last, and one for all.
LEGAL = (
    *((name, []) for name in ("mlp_only_layers", "moe_layers", "full_attn_idxs", "attn_layer_indices")),
    *(("moe_layer_end_index", -1), ("moe_topk", 2)),
)
# Without which others fields are read.
WITHOUT = {
    "max_window_layers": {"layer_types": ...},
    "sliding_window_pattern": {"layer_types": ...},
    "mamba_expand": {"mamba_d_ssm": None},
}


def kind_of(field):
    """What a field is."""
    kinds = {typing.get_origin(kind) or kind for kind in typing.get_args(field.type) or (field.type,)}
    kinds = {str if kind is typing.Literal else kind for kind in kinds}
    return next(kind for kind in (list, dict, float, bool, int, str) if kind in kinds)


@pytest.mark.parametrize("family", model_types())
def test_fields_of_all_families(family):
    pytest.importorskip("transformers")
    found = [variant.fields for name, variant in variants().items() if name.partition("-")[0] == family]
    good = found[0] if found else GPT2 if family == "gpt2" else BASE
    inside = good.get("text_config", good)
    own = own_fields(text_class(family))
    if "use_sliding_window" in {field.name for field in own}:
        inside = inside | {"use_sliding_window": True, "sliding_window": 9}

    def parse(**change):
        text = {name: value for name, value in (inside | change).items() if value is not ...}
        parse_config({"model_type": family} | ({**good, "text_config": text} if "text_config" in good else text))

    def problem_of(change):
        try:
            parse(**change)
        except ValueError as error:
            return str(error)
        return ""

    assert not problem_of({})
    with pytest.raises(ValueError, match="per_layer_config is "):
        parse(per_layer_config={"0": {"hidden_act": "relu"}})
    for field in own:
        if field.name in (*INERT, *FIXED, *UNREAD.get(family, ())):
            continue
        others = WITHOUT.get(field.name, {})
        for value in (None, ...):  # which defaults may not go with the rest
            text = problem_of({field.name: value})
            assert not text or re.search(rf"\b{field.name}\b.* (null|missing)\b", text)
        for value in BAD_VALUES[kind_of(field)]:
            if (field.name, value) in LEGAL:
                continue
            if (field.name, value) == ("no_rope_layers", []) and family.startswith("llama4"):  # as if it were absent
                continue
            with pytest.raises(ValueError, match=rf"{field.name}\b") as caught:
                parse(**others | {field.name: value})
            assert "\n" not in str(caught.value), (field.name, value)


@pytest.mark.parametrize("family", ["gemma3_text", "olmo3"])
def test_what_transformers_does_not_read_of_one_layer_type(family):
    full = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "truncate": False}
    ropes = {"full_attention": full, "sliding_attention": {"rope_type": "default"}}
    data = BASE | {"model_type": family, "rope_parameters": ropes}
    with pytest.raises(ValueError, match="rope_parameters: truncate is False"):
        parse_config(data)
    full["truncate"] = True
    parse_config(data)


def test_fields_that_the_architecture_cannot_do_without(tmp_path):
    for base, model_type in ((BASE, "llama"), (GPT2, "gpt2")):
        good = base | {"model_type": model_type}
        for field in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
            if field in good and field != "vocab_size":
                (tmp_path / "config.json").write_text(
                    json.dumps({key: value for key, value in good.items() if key != field})
                )
                refusal(tmp_path, f"{field} is missing")


MAMBA = {"hidden_size": 32, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}
OF_LAYERS = "it must be a list of layers, from 0 to 1 (num_hidden_layers)"


@pytest.mark.parametrize(
    ("family", "fields", "text"),
    [
        ("llama", {"num_hidden_layers": None}, "num_hidden_layers is null: it must be an integer from 1 to 1000"),
        ("mistral", {"num_key_value_heads": ...}, "num_key_value_heads is missing (by default 8): it must divide"),
        ("qwen2_vl", {"num_attention_heads": ...}, "it must be at least num_attention_heads, missing (by default 64)"),
        (
            "olmoe",
            {"num_experts": 4},
            "num_experts_per_tok is missing (by default 8): it must be at most num_experts, 4",
        ),
        ("bamba", {"mamba_n_heads": None}, "mamba_n_heads is null (by default 128): its product with"),
        ("bamba", {"mamba_n_heads": ..., "mamba_d_head": None}, "is missing (by default 128): it must divide mamba"),
        ("bamba", {"mamba_n_heads": None, "mamba_d_head": "auto"}, "is null (by default 128): it must divide"),
        ("bamba", {"mamba_n_groups": 3}, "mamba_n_groups is 3: it must divide mamba_n_heads, 8"),
        ("granitemoehybrid", {"mamba_n_heads": None}, "mamba_n_heads is null (by default 128): its product"),
        ("granitemoehybrid", {"layers_block_type": ["mamba", "x"]}, "layers_block_type is ['mamba', 'x']: x is not"),
        ("falcon_h1", {"mamba_d_ssm": ...}, "must be mamba_d_ssm, missing (by default 1024)"),
        ("mamba2", {"num_heads": None}, "num_heads is null (by default 128): its product with head_dim, missing"),
        ("jamba", {"attn_layer_offset": None, "attn_layer_period": 2}, "attn_layer_offset is null (by default 4)"),
        ("jamba", {"attn_layer_offset": 9}, "it must be less than attn_layer_period, missing (by default 8)"),
        (
            "qwen3_5_text",
            {"linear_num_key_heads": None, "linear_num_value_heads": 4},
            "linear_num_value_heads is 4: linear_num_key_heads, null (by default 16), must divide it",
        ),
        (
            "nemotron_h",
            {"layers_block_type": ["mamba"] * 2, "mamba_n_groups": 3},
            "mamba_n_groups is 3: it must divide",
        ),
        ("nemotron_h", {"layers_block_type": ["moe"]}, "layers_block_type is ['moe']: no layer keeps anything of a"),
        ("nemotron_h", {"hybrid_override_pattern": "-E"}, "hybrid_override_pattern is '-E': no layer keeps anything"),
        ("nemotron_h", {"hybrid_override_pattern": "M*", "num_hidden_layers": 3}, "num_hidden_layers is 3: hybrid"),
        ("bamba", {"attn_layer_indices": [99]}, f"attn_layer_indices is [99]: {OF_LAYERS}"),
        ("bamba", {"attn_layer_indices": [-1]}, f"attn_layer_indices is [-1]: {OF_LAYERS}"),
        ("lfm2", {"full_attn_idxs": [9]}, f"full_attn_idxs is [9]: {OF_LAYERS}"),
        (
            "lfm2",
            {"full_attn_idxs": [0], "layer_types": ["conv", "full_attention"]},
            "full_attn_idxs is [0]: layer_types says that [1] attend; remove one of the two",
        ),
        ("lfm2", {"tie_embedding": "yes"}, "tie_embedding is 'yes': it must be true or false"),
        ("lfm2", {"block_ffn_dim_multiplier": 1e9}, "block_ffn_dim_multiplier is 1000000000.0: MLPs would be"),
        ("llama4_text", {"moe_layers": [2]}, f"moe_layers is [2]: {OF_LAYERS}"),
        ("minimax_m2", {"rotary_dim": 7}, "rotary_dim is 7: it must be an even number, at most head_dim, missing (by"),
        ("gemma4_text", {"global_head_dim": 7}, "global_head_dim is 7: rotary embeddings need an even number"),
        ("llama", {"head_dim": None, "hidden_size": 28}, "head_dim is 7 (hidden_size // num_attention_heads): rotary"),
    ],
)
def test_errors_say_what_the_file_has(family, fields, text):
    base = BASE | (MAMBA if family in ("bamba", "granitemoehybrid", "falcon_h1") else {}) | fields
    with pytest.raises(CheckpointError) as caught:
        parse_config({"model_type": family} | {name: value for name, value in base.items() if value is not ...})
    assert text in str(caught.value)


def test_layers_that_are_named_twice():
    both = {"full_attn_idxs": [1], "layer_types": ["conv", "full_attention"]}
    _, config = parse_config(BASE | {"model_type": "lfm2"} | both)
    assert [mixer is None for mixer in config.mixers] == [False, True]


def test_empty_rope_parameters():
    """They are those of no scaling, as an absent type is."""
    data = BASE | {"model_type": "ministral3", "head_dim": 8}
    plain = parse_config(data | {"rope_parameters": {"rope_type": "default"}})
    assert parse_config(data | {"rope_parameters": {}}) == plain
