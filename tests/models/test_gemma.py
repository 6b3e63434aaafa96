"""Fields of Gemma's configurations: what null means, both spellings of rotary embeddings, and what is refused."""

import pytest

from jaxinfer import CheckpointError
from jaxinfer.models.registry import parse_config
from tests.models.families import BASE
from tests.refusals import line

FULL, SLIDING = "full_attention", "sliding_attention"


def parsed(model_type, **fields):
    return parse_config(BASE | {"model_type": model_type} | fields)[1]


def test_null_is_no_cap():
    config = parsed("gemma2")
    assert (config.soft_cap, config.logit_soft_cap, config.windows) == (50, 30, (4096, None))
    config = parsed("gemma2", attn_logit_softcapping=None, final_logit_softcapping=None)
    assert (config.soft_cap, config.logit_soft_cap) == (None, None)
    config = parsed("gemma2", sliding_window=None, layer_types=[FULL] * 2)
    assert config.windows == (None, None)
    assert parsed("gemma3_text").logit_soft_cap is None


@pytest.mark.parametrize(
    ("fields", "full", "sliding"),
    [
        ({}, ("default", 1e6), ("default", 1e4)),
        ({"rope_theta": 7.0, "rope_local_base_freq": 5.0}, ("default", 7), ("default", 5)),
        ({"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, ("linear", 1e6), ("default", 1e4)),
        ({"rope_parameters": {}}, ("default", 1e6), ("default", 1e4)),
        ({"rope_parameters": {FULL: {"rope_type": "linear", "factor": 2}}}, ("linear", 1e6), ("default", 1e4)),
        ({"rope_parameters": {FULL: {"rope_theta": 9.0}, SLIDING: None}}, ("default", 9), ("default", 1e4)),
        ({"rope_parameters": {SLIDING: {"rope_type": "linear", "factor": 2}}}, ("default", 1e6), ("linear", 1e4)),
        ({"rope_parameters": {FULL: {}, SLIDING: {}}, "rope_theta": 7.0}, ("default", 7), ("default", 1e4)),
    ],
)
def test_rotary_embeddings_by_type(fields, full, sliding):
    config = parsed("gemma3_text", layer_types=[FULL, SLIDING], **fields)
    for rope, expected in zip(config.ropes, (full, sliding), strict=True):
        assert (rope.kind, rope.theta) == expected
    assert config.max_context == BASE["max_position_embeddings"]


@pytest.mark.parametrize(
    ("model_type", "fields", "problem"),
    [
        ("gemma", {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
        ("gemma", {"hidden_act": "swish9"}, "hidden_act is 'swish9'"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma2", {"hidden_activation": "swish9"}, "hidden_activation is 'swish9'"),
        ("gemma2", {"sliding_window": None}, "sliding_window is null: some layers have sliding_attention"),
        ("gemma2", {"attn_logit_softcapping": 0}, "attn_logit_softcapping is 0"),
        ("gemma2", {"final_logit_softcapping": "x"}, "final_logit_softcapping is 'x'"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0"),
        ("gemma2", {"layer_types": [FULL]}, "layer_types is"),
        ("gemma2", {"rope_parameters": {FULL: {}}}, "rope_parameters is"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
        ("gemma3_text", {"rope_parameters": {"rope_type": "linear", "factor": 8.0}}, "rope_parameters is"),
        ("gemma3_text", {"rope_parameters": {FULL: 5}}, "rope_parameters is 5"),
        (
            "gemma3_text",
            {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_parameters": {FULL: {"factor": 2.0}}},
            "rope_scaling is",
        ),
    ],
)
def test_what_is_refused(model_type, fields, problem):
    text = line(lambda: parsed(model_type, **fields), CheckpointError)
    assert text.startswith(f"config.json: {problem}")
