"""Regular expressions of checkpoints."""

import time

import pytest

from jaxinfer.quantization.patterns import compile_pattern
from jaxinfer.quantization.stored import stored_quantization

NAME = "model.language_model.layers.10.self_attn.q_proj"


@pytest.mark.parametrize(
    ("pattern", "fits"),
    [
        (".*q_proj", True),
        (r".*\.layers\.\d+\.self_attn\.(q|k|v|o)_proj$", True),
        (r"model\.(language_model\.)?layers\.(?:[0-9]|[1-9][0-9])\..*", True),
        (r".*layers.*(self_attn|mlp).*(gate|up|q)_proj.*", True),
        (r"^(?!.*lm_head).*(?<=q_)proj", True),
        (r"model\..{14}\.layers\.[0-9]{2}\.self_attn\.[a-z_]{6}", True),
        (".*mlp.*", False),
    ],
)
def test_those_that_checkpoints_have(pattern, fits):
    assert (compile_pattern(pattern).match(NAME) is not None) == fits


@pytest.mark.parametrize(
    "pattern",
    [
        "(.*)*x",
        "(a+)+$",
        "(.|m)*x",
        "(.*.*)?.*.*.*.*x",
        ".*" * 6 + "x",
        "(m|m)(o|o)" * 15 + "x",
        "m?" * 40 + "m" * 40,
        "(?:(?:.?){9}){9}x",
        "(?=(.*)*x)",
        "(?>(.*)*)x",
        "(" * 5000,
        "(",
        "a{5,2}",
        "x{99999999999999999999}",
    ],
)
def test_those_that_take_for_ever(pattern):
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"it repeats too much|it is no regular expression"):
        compile_pattern(pattern)
    assert time.monotonic() - began < 5


def test_a_config_says_which_field():
    weights = {"type": "int", "num_bits": 8, "strategy": "channel"}
    group = {"targets": ["Linear"], "weights": weights, "format": "int-quantized"}
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ["re:(.*)*x"]}
    stored = stored_quantization({"quantization_config": config})
    with pytest.raises(ValueError, match=r"targets or ignore is 're:\(\.\*\)\*x': it repeats too much: .*; or take"):
        stored.format_of(NAME, "Linear")
