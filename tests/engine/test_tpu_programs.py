"""The engine's real programs through the real TPU compiler, for a slice that is not there (libtpu, no TPU)."""

import json
import math
import os
import subprocess
import sys

import pytest

pytest.importorskip("libtpu")

# In a process of its own: libtpu can be loaded once, and this one has devices of its own kind.
SCRIPT = """
import json, re, sys
import jax, numpy as np
from jax.experimental import topologies
from jaxinfer.engine.buckets import Buckets
from jaxinfer.engine.programs import Programs
from jaxinfer.models.model import Model
from jaxinfer.sharding import make_mesh

LLAMA_8B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
    "tie_word_embeddings": False, "rope_theta": 500000.0,
}
name, chips, tensor = sys.argv[1], tuple(map(int, sys.argv[2].split("x"))), int(sys.argv[3])
topology = topologies.get_topology_desc(topology_name=name, platform="tpu", chips_per_host_bounds=chips)
mesh = make_mesh(f"tensor={tensor}", topology.devices, 32, 8, 4096)
programs = Programs(
    Model.from_config(LLAMA_8B, "bfloat16"), mesh, Buckets.make(64, 1024), num_pages=1025, page_size=32,
    max_model_len=4096, max_rows=64, max_steps=32,
)

def size(tree):
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(tree))

for key in (("decode", 64, 64), ("step", 256, 64)):
    compiled = programs.lower(key).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    print(json.dumps({
        "key": key, "arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes,
        "aliased": memory.alias_size_in_bytes, "weights": size(programs.params), "state": size(programs.state),
        "cache": size(programs.state.cache),
        "reductions": len(re.findall(r"= \\S+ all-reduce(?:-start)?\\(", text)),
        "gathered": re.findall(r"= \\w+\\[([\\d,]*)\\]\\S* all-gather(?:-start)?\\(", text),
    }))
"""
QUIET = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}


def test_compiled_for_a_slice():
    """Llama 8B's widths, two layers: the pool is aliased, weights stay where they are, two reductions a layer."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "v5e:2x4", "2x4x1", "8"],
        capture_output=True,
        text=True,
        env=os.environ | QUIET | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 2
    for figures in lines:
        assert figures["arguments"] == pytest.approx(figures["weights"] + figures["state"], rel=0.01)
        assert figures["aliased"] >= figures["cache"]
        assert figures["reductions"] == 2 * 2 + 1
        gathered = [math.prod(map(int, shape.split(","))) for shape in figures["gathered"]]
        assert all(count in (64 * 128256, 128 * 128256) for count in gathered), "more than logits"
        assert figures["temporaries"] < 200 * 2**20
