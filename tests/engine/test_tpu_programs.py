"""The engine's real programs through the real TPU compiler, for slices that are not there (libtpu, no TPU)."""

import json
import math
import os
import subprocess
import sys

import pytest

from tests.deployments import deployment_of

pytest.importorskip("libtpu")

# In a process of its own: libtpu can be loaded once, and this one has devices of its own kind.
SCRIPT = """
import json, re, sys
import jax, numpy as np
import jaxinfer.attention.tpu as attention
import jaxinfer.attention.fused as fused
from jaxinfer.engine.buckets import Buckets
from jaxinfer.engine.programs import Programs
from jaxinfer.models.model import AbstractModel
from jaxinfer.plan.targets import find_target
from jaxinfer.sharding import make_mesh

LLAMA_8B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
    "tie_word_embeddings": False, "rope_theta": 500000.0,
}

asked, block_sizes = [], attention.block_sizes

def noted(kind, *rest):
    asked.append((kind, *block_sizes(kind, *rest)))
    return block_sizes(kind, *rest)

attention.block_sizes = noted
tokamax_version = fused.tokamax_version

def size(tree):
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(tree))

for case in json.loads(sys.argv[1]):
    fused.tokamax_version = tokamax_version if case.get("tokamax") else lambda: None
    devices = find_target(case["topology"]).devices
    config = LLAMA_8B | case["config"]
    heads = config["num_attention_heads"], config["num_key_value_heads"], config["hidden_size"]
    rows = case["rows"]
    programs = Programs(
        AbstractModel.from_config(config, "bfloat16", case.get("quantization")),
        make_mesh(case["mesh"], devices, *heads) or devices[0],
        Buckets.make(rows, 1024), num_pages=1025, page_size=case.get("page_size", 64), max_model_len=4096,
        max_rows=rows, max_steps=32, kv_cache_dtype=case.get("kv_cache_dtype", "auto"),
    )
    for key in (("full_decode", rows), ("forward", case["tokens"]), ("full_sample", rows)):
        asked.clear()
        compiled = programs[key].lower().compile()
        memory, text = compiled.memory_analysis(), compiled.as_text()
        collectives = {kind: re.findall(rf"= \\w+\\[([\\d,]*)\\]\\S* {kind}(?:-start)?\\(", text)
                       for kind in ("all-reduce", "all-gather")}
        params, changed, read, *_ = programs[key].arguments
        if key[0] == "forward":  # which does without what the head alone has
            params = {name: params[name] for name in params if name not in programs.model.head}
        print(json.dumps({
            "key": key, "held": size((params, changed, read)), "changed": size(changed),
            "arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes,
            "aliased": memory.alias_size_in_bytes, "weights": size(programs.params),
            "cache": size(programs.state.cache),
            "kernels": len(re.findall("custom_call_target=.tpu_custom_call", text)),
            "blocks": sorted(set(asked)), "scattered": re.findall(r"bf16\\[1025,[\\d,]*\\]\\S* scatter\\(", text),
            "fused": len(set(re.findall(r"%(RPA[\\w.-]*) = [^\\n]*tpu_custom_call", text))),
            "copied": re.findall(r"= (?:bf16|f8e4m3fn)\\[1025,[\\d,]*\\]\\S* copy(?:-start)?\\(", text),
            "attention": programs.layout.names,
        } | collectives))
"""
QUIET = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
MIB = 2**20


def compiled(*cases):
    """For each case what decodes, and what does the two parts of a mixed call."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(cases)],
        capture_output=True,
        text=True,
        env=os.environ | QUIET | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 3 * len(cases)
    return lines


def elements(shapes):
    return [math.prod(map(int, shape.split(","))) for shape in shapes if shape]


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
        assert figures["kernels"] == (layers if kind != "full_sample" else 0)
        for device, *_, fast_memory in figures["blocks"]:
            assert device == f"TPU {topology[:2]} lite", "the slice's, not this machine's"
            assert fast_memory
        assert len(figures["blocks"]) == (kind != "full_sample")
        assert not figures["copied"]
        reductions = sum(count == rows * width for count in elements(figures["all-reduce"]))
        assert reductions == (2 * layers + 1 if kind != "full_sample" else 0)
        others = [c for c in elements(figures["all-reduce"] + figures["all-gather"]) if c != rows * width]
        assert max(others, default=0) <= chips * 128 * 20, "more than the likeliest tokens of each device"
        assert figures["temporaries"] < limit * MIB


@pytest.mark.parametrize(
    ("topology", "options", "weights"),
    [
        pytest.param("v6e-1", {"quantization": "int8"}, 1919.9, marks=pytest.mark.long),
        pytest.param("v5e-4", {"quantization": "int8", "kv_cache_dtype": "fp8"}, 480.1, marks=pytest.mark.slow),
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
        assert figures["kernels"] == (2 if figures["key"][0] != "full_sample" else 0)
        assert not figures["copied"]
        assert figures["temporaries"] < 100 * MIB


@pytest.mark.slow
def test_weights_are_gathered_a_layer_at_a_time():
    """What a program needs beside its arguments doesn't grow with the layers; it is about two layers' weights."""
    case = {"topology": "v5e-8", "mesh": "fsdp=4,tensor=2", "rows": 8, "tokens": 128}
    few, _, _, many, _, _ = compiled(*(case | {"config": {"num_hidden_layers": n, "vocab_size": 8192}} for n in (5, 7)))
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
def test_the_kernel_compiles(topology):
    """Head sizes and numbers of heads that are padded, wide heads, a call each, windows, one and many key/value
    heads."""
    small = {"num_hidden_layers": 1, "vocab_size": 1024, "hidden_size": 512, "intermediate_size": 512, "head_dim": 64}
    models = (
        {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256},
        {"num_attention_heads": 12, "num_key_value_heads": 12},
        {"model_type": "mistral", "num_attention_heads": 6, "num_key_value_heads": 3, "sliding_window": 100},
    )
    case = {"topology": topology, "mesh": "data=1", "rows": 16, "tokens": 128}
    programs = compiled(*(case | {"config": small | model} for model in models))
    for figures, calls in zip(programs, (2, 2, 2, *[1] * 6), strict=True):
        assert figures["kernels"] == (calls if figures["key"][0] != "full_sample" else 0)
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
        assert figures["kernels"] == (4 if figures["key"][0] != "full_sample" else 0)
        assert figures["aliased"] >= figures["changed"]
        assert not figures["copied"]
        assert figures["temporaries"] < figures["cache"] / 4


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "model_type"), [("v5e-8", "llama"), ("v6e-8", "gemma2"), ("v5p-16", "llama")])
def test_the_kernel_of_tokamax_compiles(topology, model_type):
    """Where it is installed: keys and values are written by it, and the pool is aliased and nowhere copied."""
    pytest.importorskip("tokamax")
    case = {"topology": topology, "mesh": "tensor=8", "rows": 64, "tokens": 1024, "tokamax": True}
    config = {"num_hidden_layers": 2, "vocab_size": 8192, "model_type": model_type}  # the one has a soft cap
    for figures, most in zip(compiled(case | {"config": config}), (80, 160, 60), strict=True):
        kernels = 3 * 2 if figures["key"][0] != "full_sample" else 0
        assert figures["fused"] == kernels, "of each layer one for decoding rows and two for chunks"
        assert not figures["blocks"], "JAX's kernel"
        assert not figures["scattered"]
        assert not figures["copied"]
        assert figures["aliased"] >= figures["changed"]
        assert figures["temporaries"] < most * MIB


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "mesh", "quantization"),
    [
        ("v5e-8", "tensor=8", None),
        ("v6e-8", "data=2,tensor=4", None),
        ("v5e-8", "tensor=8", "int8"),
        ("v5e-8", "tensor=8", "int4"),
    ],
)
def test_experts_stay_where_they_are(topology, mesh, quantization):
    """128 of them over eight chips: there is no room for a copy, and a layer still has two reductions. What prefill
    takes are mostly its tokens, each as often as it has experts. In floats all three products are a kernel's."""
    shards = 2 if "data=2" in mesh else 1
    case = {"topology": topology, "mesh": mesh, "config": QWEN3_30B, "rows": 64 // shards, "tokens": 1024 // shards}
    decode, forward, _ = compiled(case | {"quantization": quantization})
    assert decode["kernels"] == forward["kernels"] == 2 * (1 if quantization else 4)
    print(topology, quantization, *(f"{figures['temporaries'] / MIB:.1f} MiB" for figures in (decode, forward)))
    values = 16 * 768 * 2048 * {None: 2, "int8": 1, "int4": 0.5}[quantization]
    dequantized = 768 * 2048 * (4 if quantization == "int4" else 0)  # of one expert
    assert decode["temporaries"] - dequantized < min({"v5e-8": 12, "v6e-8": 24}[topology] * MIB, values)
    tokens = 8 * 1024 * 2048 * 2
    assert forward["temporaries"] - dequantized < 2.5 * tokens
    assert len(forward["all-reduce"]) == 5


@pytest.mark.parametrize(
    "topology", [pytest.param("v5e-8", marks=pytest.mark.slow), pytest.param("v6e-8", marks=pytest.mark.long)]
)
def test_gpt_oss(topology):
    """120B's widths, two layers: experts stay in mxfp4, with nothing of their size beside them; and attention in plain
    XLA, whose pools are aliased, and nowhere copied."""
    config = deployment_of("gpt-oss-120b_v6e-8").architecture | {"num_hidden_layers": 2}
    case = {"topology": topology, "mesh": "tensor=8", "config": config, "rows": 64, "tokens": 1024}
    decode, forward, _ = compiled(case)
    print(topology, *(f"{figures['temporaries'] / MIB:.1f} MiB" for figures in (decode, forward)))
    experts = 2 * 3 * 16 * 2880 * 2880 * 17 // 32
    assert experts < decode["weights"] < experts + 2 * 201088 // 8 * 2880 * 2 + 100 * MIB
    for figures in (decode, forward):
        assert set(figures["attention"]) == {"plain XLA on TPUs"}
        assert figures["arguments"] == pytest.approx(figures["held"], rel=0.02)
        assert figures["aliased"] >= figures["changed"]
        assert not figures["copied"]
        reductions = sum(count == figures["key"][1] * 2880 for count in elements(figures["all-reduce"]))
        assert reductions == 2 * 2 + 1
    # What one expert is dequantized to among them, and less than the experts of a layer, or a layer's pool.
    assert max(decode["temporaries"], forward["temporaries"]) < experts / 2
