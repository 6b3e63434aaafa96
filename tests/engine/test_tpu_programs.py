"""The engine's real programs through the real TPU compiler, for slices that are not there (libtpu, no TPU)."""

import pytest

from tests.engine.tpu import MIB, compiled, elements

pytest.importorskip("libtpu")

CALLS = {"full_decode": 1, "decode": 1, "forward": 2, "full_sample": 0}  # of our kernel in each layer
LLAMA_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}


@pytest.mark.parametrize(
    ("topology", "widths", "most"),
    [
        pytest.param("v5e-8", {}, (80, 160, 60), id="8B", marks=pytest.mark.slow),
        pytest.param("v6e-16", LLAMA_70B, (80, 160, 60), id="70B", marks=pytest.mark.long),
    ],
)
def test_compiled_for_a_slice(topology, widths, most):
    """Llama's widths, two layers: the pool is aliased, weights stay where they are, two reductions a layer, pages are
    read in place, and sampling has no more than a part of the logits. Each chip has one of the 8 key/value heads."""
    layers, width, chips = 2, widths.get("hidden_size", 4096), int(topology.split("-")[1])
    case = {"topology": topology, "mesh": f"tensor={chips}", "rows": 64, "tokens": 1024}
    for figures, limit in zip(compiled(case | {"config": widths | {"num_hidden_layers": layers}}), most, strict=True):
        assert figures["cache"] == layers * 1025 * 64 * 2 * 128 * 2  # pages, tokens, key and value, features, bytes
        assert figures["arguments"] == pytest.approx(figures["held"], rel=0.01)
        assert figures["aliased"] >= figures["changed"]
        kind, rows = figures["key"]
        assert figures["kernels"] == layers * CALLS[kind]
        assert not figures["copied"]
        split = kind == "forward"  # whose tokens are split between products; the embedding's sum is scattered too
        reductions = sum(count == rows * width for count in elements(figures["all-reduce"]))
        assert reductions == {"forward": 1, "full_sample": 0}.get(kind, 2 * layers + 1)
        assert elements(figures["reduce-scatter"]) == [rows * width // chips] * (2 * layers * split)
        assert sum(count == rows * width for count in elements(figures["all-gather"])) == (2 * layers + 1) * split
        others = [c for c in elements(figures["all-reduce"] + figures["all-gather"]) if c != rows * width]
        assert max(others, default=0) <= chips * 128 * 20, "more than the likeliest tokens of each device"
        assert figures["temporaries"] < limit * MIB


@pytest.mark.parametrize(
    ("topology", "options", "weights"),
    [
        pytest.param("v6e-1", {"quantization": "int8"}, 1919.9, marks=pytest.mark.long),
        pytest.param("v5e-4", {"quantization": "int8", "kv_cache_dtype": "fp8"}, 480.1, marks=pytest.mark.slow),
        pytest.param("v5e-8", {"quantization": "int8", "kv_cache_dtype": "int8"}, 240.1, marks=pytest.mark.slow),
        pytest.param("v5e-8", {"quantization": "int4"}, 196.9, marks=pytest.mark.slow),
        # Scales are laid out otherwise where there are few of a row.
        pytest.param("v6e-1", {"quantization": "int4-g128"}, 1489.2, marks=pytest.mark.long),
    ],
)
def test_fewer_bits(topology, options, weights):
    """Weights are there as they were quantized, once. Nothing of their size is beside them, and no more of the logits
    than a block of rows needs. weights: MiB of two layers' values and scales, and of the bfloat16 embedding."""
    case = {"topology": topology, "mesh": f"tensor={topology.split('-')[1]}", "rows": 64, "tokens": 64}
    for figures in compiled(case | options | {"config": {"num_hidden_layers": 2}}):
        assert figures["weights"] == pytest.approx(weights * MIB, rel=1e-3)
        assert figures["arguments"] == pytest.approx(figures["held"], rel=0.01)
        assert figures["aliased"] >= figures["changed"]
        assert figures["kernels"] == 2 * CALLS[figures["key"][0]]
        assert not figures["copied"]
        assert figures["temporaries"] < 100 * MIB


@pytest.mark.slow
def test_weights_are_gathered_a_layer_at_a_time():
    """What a program needs beside its arguments doesn't grow with the layers; it is about two layers' weights."""
    case = {"topology": "v5e-8", "mesh": "fsdp=4,tensor=2", "rows": 8, "kinds": ["decode"]}
    few, many = compiled(*(case | {"config": {"num_hidden_layers": n, "vocab_size": 8192}} for n in (5, 7)))
    layer = (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336) * 2 / 2
    assert abs(many["temporaries"] - few["temporaries"]) < layer / 4
    assert many["temporaries"] < 2.5 * layer


@pytest.mark.parametrize(
    "topology",
    [
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("v5e-1", "v6e-1")),
        *(pytest.param(name, marks=pytest.mark.long) for name in ("v4-8", "v5p-8", "tpu7x-1")),
    ],
)
def test_the_kernel_of_jax_compiles(topology):
    """Head sizes and numbers of heads that are padded, wide heads, a call each, windows, one and many key/value
    heads."""
    small = {"num_hidden_layers": 1, "vocab_size": 1024, "hidden_size": 512, "intermediate_size": 512, "head_dim": 64}
    models = (
        {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256},
        {"num_attention_heads": 12, "num_key_value_heads": 12},
        {"model_type": "mistral", "num_attention_heads": 6, "num_key_value_heads": 3, "sliding_window": 100},
    )
    case = {"topology": topology, "mesh": "data=1", "rows": 16, "tokens": 128, "attention": "jax"}
    programs = compiled(*(case | {"config": small | model} for model in models))
    for figures, calls in zip(programs, (2, 2, 2, *[1] * 6), strict=True):
        assert figures["kernels"] == (calls if figures["key"][0] != "full_sample" else 0)
        kinds = {device for device, *_ in figures["blocks"]}
        assert len(kinds) == (figures["key"][0] != "full_sample")
        assert all(kind.startswith("TPU") for kind in kinds), "the slice's, not this machine's"
        assert figures["aliased"] >= figures["changed"]
        assert figures["temporaries"] < figures["cache"]


@pytest.mark.slow
def test_layers_with_windows_share_arrays_with_those_that_see_everything():
    """One array, which four layers use in turn, each by a page table of its own: it is aliased, and nowhere copied."""
    kinds = ["sliding_attention"] * 3 + ["full_attention"]
    widths = {"vocab_size": 1024, "hidden_size": 512, "intermediate_size": 512, "head_dim": 128}
    mixed = {"model_type": "qwen3", "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8}
    windows = {"use_sliding_window": True, "sliding_window": 1024, "layer_types": kinds}
    case = {"topology": "v5e-1", "mesh": "data=1", "rows": 16, "tokens": 128}
    for figures in compiled(case | {"config": widths | mixed | windows}):
        assert figures["cache"] == 1025 * 64 * 2 * 8 * 128 * 2, "of one layer"
        assert figures["kernels"] == 4 * CALLS[figures["key"][0]]
        assert figures["aliased"] >= figures["changed"]
        assert not figures["copied"]
        assert figures["temporaries"] < figures["cache"] / 4


@pytest.mark.parametrize(
    "topology", [pytest.param("v5e-8", marks=pytest.mark.slow), pytest.param("v6e-8", marks=pytest.mark.long)]
)
def test_states_beside_pages(topology):
    """Attention and a gated delta net of Qwen3.6-35B-A3B's widths: pages and states are aliased and nowhere copied,
    each chip has its heads of both, and there are no more reductions than in other models. So it is where some are
    copied for others: they go one by one."""
    widths = {"hidden_size": 2048, "intermediate_size": 512, "num_attention_heads": 16, "num_key_value_heads": 2}
    types = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    config = {"model_type": "qwen3_5_text", "head_dim": 256, "vocab_size": 8192} | widths | types
    case = {"topology": topology, "mesh": "tensor=8", "rows": 64, "tokens": 1024, "snapshots": 64}
    kinds = ["full_decode", "forward", "copy"]
    pages, states = 1025 * 64 * 2 * 256 * 2, 129 * (4 * 128 * 128 + 3 * 2 * (128 + 128 + 2 * 128)) * 4
    for figures in compiled(case | {"config": config, "kinds": kinds}):
        assert figures["cache"] == pages + states
        assert figures["aliased"] >= figures["changed"]
        assert not figures["copied"] + figures["states_copied"]
        kind, size = figures["key"]
        reductions = sum(count == size * 2048 for count in elements(figures["all-reduce"]))
        assert reductions == {"forward": 1, "copy": 0}.get(kind, 2 * 2 + 1)
        assert elements(figures["reduce-scatter"]) == [size * 2048 // 8] * (2 * 2 * (kind == "forward"))
        assert figures["temporaries"] < (20 if kind != "copy" else 2) * MIB


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "model_type"), [("v5e-8", "llama"), ("v6e-8", "gemma2"), ("v5p-16", "llama")])
def test_the_kernel_of_tokamax_compiles(topology, model_type):
    """Where it is installed: keys and values are written by it, and the pool is aliased and nowhere copied."""
    pytest.importorskip("tokamax")
    case = {"topology": topology, "mesh": "tensor=8", "rows": 64, "tokens": 1024, "attention": "tokamax"}
    config = {"num_hidden_layers": 2, "vocab_size": 8192, "model_type": model_type}  # the one has a soft cap
    for figures, most in zip(compiled(case | {"config": config}), (80, 160, 60), strict=True):
        kernels = 3 * 2 if figures["key"][0] != "full_sample" else 0
        assert figures["fused"] == kernels, "of each layer one for decoding rows and two for chunks"
        assert not figures["blocks"], "JAX's kernel"
        assert not figures["scattered"]
        assert not figures["copied"]
        assert figures["aliased"] >= figures["changed"]
        assert figures["temporaries"] < most * MIB
