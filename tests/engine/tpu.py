"""The engine's real programs through the real TPU compiler: what of them is told."""

import json
import math
import os
import subprocess
import sys

# In a process of its own: libtpu can be loaded once, and this one has devices of its own kind.
SCRIPT = """
import json, re, sys
import jax, numpy as np
import jaxinfer.attention.tpu as attention
from jaxinfer.engine.buckets import Buckets
from jaxinfer.engine.programs import AdapterLimits, Programs
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

def size(tree):
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(tree))

for case in json.loads(sys.argv[1]):
    devices = find_target(case["topology"]).devices
    config = LLAMA_8B | case["config"]
    heads = config["num_attention_heads"], config["num_key_value_heads"], config["hidden_size"]
    rows, slots = case["rows"], case["rows"] + 1 + case.get("snapshots", 0)
    programs = Programs(
        AbstractModel.from_config(config, "bfloat16", case.get("quantization")),
        make_mesh(case["mesh"], devices, *heads) or devices[0],
        Buckets.make(rows, 1024), num_pages=1025, page_size=case.get("page_size", 64), max_model_len=4096,
        max_rows=rows, max_steps=32, kv_cache_dtype=case.get("kv_cache_dtype", "auto"),
        attention=case.get("attention", "auto"), snapshots=case.get("snapshots", 0),
        adapter_limits=AdapterLimits(*case.get("adapters", ())),
    )
    for kind in case["kinds"]:
        key = kind, case["tokens"] if kind.endswith("forward") else rows
        asked.clear()
        compiled = programs[key].lower().compile()
        memory, text = compiled.memory_analysis(), compiled.as_text()
        collectives = {kind: re.findall(rf"= \\w+\\[([\\d,]*)\\]\\S* {kind}(?:-start)?\\(", text)
                       for kind in ("all-reduce", "all-gather", "reduce-scatter")}
        params, changed, read, *_ = programs[key].arguments
        if key[0].endswith("forward"):  # which does without what the head alone has
            params = {name: params[name] for name in params if name not in programs.model.head}
        print(json.dumps({
            "key": key, "held": size((params, changed, read)), "changed": size(changed),
            "arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes,
            "aliased": memory.alias_size_in_bytes, "weights": size(programs.params),
            "cache": size(programs.state.cache), "adapters": size(programs.adapters),
            "kernels": len(re.findall("custom_call_target=.tpu_custom_call", text)),
            "blocks": sorted(set(asked)), "scattered": re.findall(r"bf16\\[1025,[\\d,]*\\]\\S* scatter\\(", text),
            "fused": len(set(re.findall(r"%(RPA[\\w.-]*) = [^\\n]*tpu_custom_call", text))),
            "copied": re.findall(r"= (?:bf16|f8e4m3fn|s8|f32)\\[1025,[\\d,]*\\]\\S* copy(?:-start)?\\(", text),
            "states_copied": re.findall(rf"= f32\\[{slots},[\\d,]*\\]\\S* copy(?:-start)?\\(", text),
            "attention": programs.layout.names,
        } | collectives))
"""
QUIET = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
MIB = 2**20


def compiled(*cases):
    """For each case its programs, of `kinds`: what decodes, and what does the two parts of a mixed call."""
    cases = [{"kinds": ["full_decode", "forward", "full_sample"]} | case for case in cases]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(cases)],
        capture_output=True,
        text=True,
        env=os.environ | QUIET | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == sum(len(case["kinds"]) for case in cases)
    return lines


def elements(shapes):
    return [math.prod(map(int, shape.split(","))) for shape in shapes if shape]
