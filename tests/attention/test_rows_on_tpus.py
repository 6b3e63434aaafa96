"""Attention within rows through the real TPU compiler (libtpu, no TPU)."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("libtpu")

# In a process of its own: libtpu can be loaded once, and this one has devices of its own kind.
SCRIPT = """
import json, sys
import jax, jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from jaxinfer.attention import AttentionSpec, ForwardBatch, Relative
from jaxinfer.attention.rows import attend_rows
from jaxinfer.plan.targets import find_target

TOKENS, ROWS = 2048, 256
sharding = SingleDeviceSharding(find_target("v5e-1").devices[0])

def shape(*sizes, dtype="int32"):
    return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype), sharding=sharding)

for heads, head_dim, window, bias, products in json.loads(sys.argv[1]):
    spec, inside = AttentionSpec(head_dim**-0.5, causal=False, window=window), heads * head_dim
    stream = shape(TOKENS, inside, dtype="bfloat16")
    near = shape(heads, 1023, head_dim, dtype="bfloat16") if products else None
    relative = Relative(shape(heads, 255, dtype="float32") if bias else None, near, near)
    token = shape(TOKENS)
    batch = ForwardBatch(token, token, token, shape(ROWS + 1), shape(ROWS), (), shape(3))

    def run(q, k, v, batch, relative):
        q, k, v = (x.reshape(TOKENS, heads, head_dim) for x in (q, k, v))
        return attend_rows(q, k, v, batch, spec, None, relative).reshape(TOKENS, inside)

    compiled = jax.jit(run).lower(stream, stream, stream, batch, relative).compile()
    print(json.dumps([compiled.memory_analysis().temp_size_in_bytes, " scatter(" in compiled.as_text()]))
"""
QUIET = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
MIB = 2**20
# Heads, their size, window, a bias, products with distances; and MiB at most, where scores of a whole stream have 200.
CASES = [
    (12, 64, None, False, False, 16),  # BERT-base
    (16, 64, 65, False, False, 16),  # ModernBERT-large
    (12, 64, None, True, False, 16),  # MPNet
    (12, 64, None, False, True, 32),  # DeBERTa-v3-base
]


@pytest.mark.slow
def test_temporaries():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([case[:-1] for case in CASES])],
        capture_output=True,
        text=True,
        env=os.environ | QUIET | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    for (temporaries, scatters), case in zip(lines, CASES, strict=True):
        assert temporaries < case[-1] * MIB, case
        assert not scatters
