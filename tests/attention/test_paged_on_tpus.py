"""The kernel of our own through the real TPU compiler (libtpu, no TPU): for each generation, with all that it has."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("libtpu")

# In a process of its own: libtpu can be loaded once, and what Mosaic can't lay out may end the process.
SCRIPT = """
import json, re, sys
import jax, jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from jaxinfer.attention import AttentionSpec, ForwardBatch, LayerLayout, Table
from jaxinfer.attention.paged_kernel import attend_rows_in_place
from jaxinfer.cache import FullAttentionSpec
from jaxinfer.plan.targets import find_target

PAGES, ROWS = 10001, 64
device = find_target(sys.argv[1]).devices[0]
sharding = SingleDeviceSharding(device)

def shape(*sizes, dtype="int32"):
    return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype), sharding=sharding)

for heads, kv_heads, head_dim, page_size, dtype, kept, window, decode_only in json.loads(sys.argv[2]):
    tokens = ROWS if decode_only else 512
    cache = LayerLayout.of(FullAttentionSpec(kv_heads, head_dim), dtype, device, "paged", kept).arrays(PAGES, page_size)
    token = shape(tokens)
    tables = (Table(shape(ROWS, 4096 // page_size)),)
    batch = ForwardBatch(token, token, token, shape(ROWS + 1), shape(ROWS), tables, shape(3), decode_only=decode_only)
    spec = AttentionSpec(head_dim**-0.5, window=window, soft_cap=30.0 if window else None)
    more = shape(heads, dtype="float32")

    def run(q, k, v, cache, batch, sinks, slopes):
        q, k, v = (x.reshape(tokens, -1, head_dim) for x in (q, k, v))
        out, cache = attend_rows_in_place(q, k, v, cache, batch, spec, sinks, slopes if window else None)
        return out.reshape(tokens, -1), cache

    streams = (shape(tokens, count * head_dim, dtype=dtype) for count in (heads, kv_heads, kv_heads))
    mesh = jax.sharding.Mesh([device], "x").abstract_mesh
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(run, donate_argnums=3).trace(*streams, cache, batch, more, more).lower()
    compiled = lowered.compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    print(json.dumps({
        "kernels": len(re.findall("custom_call_target=.tpu_custom_call", text)),
        "copied": re.findall(rf"= \\w+\\[{PAGES},[\\d,]*\\]\\S* copy(?:-start)?\\(", text),
        "temporaries": memory.temp_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "cache": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)),
    }))
"""
QUIET = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
MIB = 2**20
# Query heads, key/value heads, their size, page size, dtype, of the cache, window (with it a soft cap and ALiBi, too),
# and whether all rows decode.
CASES = [
    (32, 8, 128, 64, "bfloat16", "auto", None, False),  # Llama 3.1 8B
    (4, 1, 128, 64, "bfloat16", "int8", None, False),  # on one chip of eight
    (64, 8, 64, 64, "bfloat16", "auto", 128, False),  # gpt-oss
    (12, 12, 64, 64, "bfloat16", "int8", None, True),  # GPT-2
    (32, 32, 96, 64, "bfloat16", "auto", None, True),
    (16, 2, 192, 128, "bfloat16", "fp8", 512, False),
    (8, 4, 256, 64, "float32", "auto", None, True),
    (8, 4, 256, 512, "float32", "int8", 512, False),
    (8, 2, 80, 16, "bfloat16", "auto", None, True),
]


@pytest.mark.parametrize(
    "topology",
    [
        pytest.param("v5e-1", marks=pytest.mark.slow),
        *(pytest.param(name, marks=pytest.mark.long) for name in ("v4-8", "v5p-8", "v6e-1", "tpu7x-1")),
    ],
)
def test_compiled(topology):
    """Fast memory suffices, pages are nowhere copied, and beside them little is needed: queries laid out."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, topology, json.dumps(CASES)],
        capture_output=True,
        text=True,
        env=os.environ | QUIET | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == len(CASES)
    for figures, case in zip(lines, CASES, strict=True):
        assert figures["kernels"] == (1 if case[-1] else 2), case
        assert not figures["copied"], case
        assert figures["aliased"] >= figures["cache"], case
        assert figures["temporaries"] < 16 * MIB, case
