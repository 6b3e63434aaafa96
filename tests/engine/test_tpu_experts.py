"""Mixtures of experts through the real TPU compiler, for slices that are not there."""

import pytest

from tests.deployments import deployment_of
from tests.engine.tpu import MIB, compiled, elements

pytest.importorskip("libtpu")

QWEN3_30B = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}


@pytest.mark.parametrize(
    ("topology", "mesh", "quantization"),
    [
        pytest.param("v5e-8", "tensor=8", None, marks=pytest.mark.long),
        pytest.param("v6e-8", "data=2,tensor=4", None, marks=pytest.mark.slow),
        pytest.param("v5e-8", "tensor=8", "int8", marks=pytest.mark.long),
        pytest.param("v5e-8", "tensor=8", "int4", marks=pytest.mark.slow),
    ],
)
def test_experts_stay_where_they_are(topology, mesh, quantization):
    """128 of them over eight chips: there is no room for a copy, and a layer still has two reductions. All that they do
    is one kernel's, and nothing has a token as often as it has experts."""
    shards = 2 if "data=2" in mesh else 1
    case = {"topology": topology, "mesh": mesh, "config": QWEN3_30B, "rows": 64 // shards, "tokens": 1024 // shards}
    decode, forward = compiled(case | {"kinds": ["decode", "forward"], "quantization": quantization})
    assert decode["kernels"] == 2 * 2  # with that of attention
    assert forward["kernels"] == decode["kernels"] + 2  # attention of what decodes, and of the rest
    print(topology, quantization, *(f"{figures['temporaries'] / MIB:.1f} MiB" for figures in (decode, forward)))
    values = 16 * 768 * 2048 * {None: 2, "int8": 1, "int4": 0.5}[quantization]
    assert decode["temporaries"] < min(12 * MIB, values)
    assert forward["temporaries"] < 8 * 1024 * 2048 * 2
    split = shards == 1  # 1,024 tokens are, between the products of attention
    assert len(forward["all-reduce"]) == (3 if split else 5)
    assert elements(forward["reduce-scatter"]).count(128 * 2048) == 2 * split


@pytest.mark.parametrize(
    "topology", [pytest.param("v5e-8", marks=pytest.mark.slow), pytest.param("v6e-8", marks=pytest.mark.long)]
)
def test_gpt_oss(topology):
    """120B's widths, two layers: experts stay in mxfp4, with nothing of their size beside them; and attention's pools
    are aliased, and nowhere copied."""
    config = deployment_of("gpt-oss-120b_v6e-8").architecture | {"num_hidden_layers": 2}
    case = {"topology": topology, "mesh": "tensor=8", "config": config, "rows": 64, "tokens": 1024}
    decode, forward = compiled(case | {"kinds": ["decode", "forward"]})
    print(topology, *(f"{figures['temporaries'] / MIB:.1f} MiB" for figures in (decode, forward)))
    experts = 2 * 3 * 16 * 2880 * 2880 * 17 // 32
    assert experts < decode["weights"] < experts + 2 * 201088 // 8 * 2880 * 2 + 100 * MIB
    for figures in (decode, forward):
        assert set(figures["attention"]) == {"jaxinfer's ragged paged attention kernel"}
        assert figures["arguments"] == pytest.approx(figures["held"], rel=0.02)
        assert figures["aliased"] >= figures["changed"]
        assert not figures["copied"]
        reductions = sum(count == figures["key"][1] * 2880 for count in elements(figures["all-reduce"]))
        assert reductions == 2 * 2 + 1
    # What one expert is dequantized to among them, and less than the experts of a layer, or a layer's pool.
    assert max(decode["temporaries"], forward["temporaries"]) < experts / 2
