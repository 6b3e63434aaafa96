"""The kernels for experts through the real TPU compiler (libtpu, no TPU): for each generation, every scheme."""

import json
import os
import subprocess
import sys

import pytest

from jaxinfer.quantization.schemes import SCHEMES

pytest.importorskip("libtpu")

# In a process of its own: libtpu can be loaded once, and what Mosaic can't lay out may end the process.
SCRIPT = """
import json, sys
import jax, jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from jaxinfer.kernels.tpu import mixture_of_experts
from jaxinfer.kernels.tpu.grouped import grouped_product
from jaxinfer.plan.targets import find_target
from jaxinfer.quantization.schemes import SCHEMES
from jaxinfer.weights import Dense, QArray

device = find_target(sys.argv[1]).devices[0]
sharding = SingleDeviceSharding(device)

def shape(*sizes, dtype="int32"):
    return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype), sharding=sharding)

def weight(kind, dtype, *sizes):
    if kind is None:
        return Dense(shape(*sizes, dtype=dtype))
    return QArray(*(shape(*own, dtype=kept) for own, kept in SCHEMES[kind].arrays(*sizes).values()), SCHEMES[kind])

def compiled(name, run, *given):
    with jax.sharding.use_abstract_mesh(jax.sharding.Mesh([device], "x").abstract_mesh):
        lowered = jax.jit(run).trace(*given).lower(lowering_platforms=("tpu",))
    text = lowered.compile().as_text()
    print(json.dumps({"case": name, "kernels": text.count('custom_call_target="tpu_custom_call"')}))

for kind, dtype, rows, experts, outs, ins in json.loads(sys.argv[2]):
    given = shape(rows, ins, dtype=dtype), shape(experts), weight(kind, dtype, experts, outs, ins)
    compiled([kind, dtype], lambda x, sizes, weight: grouped_product(x, sizes, weight.kept), *given)

for kind, tokens, top_k, experts, features, hidden in json.loads(sys.argv[3]):
    sizes = (hidden, features), (hidden, features), (features, hidden)
    weights = [weight(kind, "bfloat16", experts, *own) for own in sizes]
    given = shape(tokens, features, dtype="bfloat16"), shape(tokens, top_k), shape(tokens, top_k, dtype="float32")

    def run(x, chosen, shares, weights):
        kept = [weight.kept for weight in weights]
        gating = lambda gate, up: jax.nn.silu(gate) * up
        return mixture_of_experts(x, chosen, shares, kept, (), gating, False, 128, lambda: jnp.zeros(x.shape))

    compiled(["mixture", kind, tokens], run, *given, weights)
"""
QUIET = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
# Scheme, dtype, rows, experts, outputs, inputs.
CASES = [
    *((kind, "bfloat16", 512, 16, 768, 2048) for kind in (None, *SCHEMES)),  # of Qwen3-30B-A3B
    *((kind, "float32", 64, 8, 512, 768) for kind in (None, "int8", "int4", "mxfp4", "fp8-block")),
    (None, "bfloat16", 64, 8, 14336, 4096),  # of Mixtral 8x7B
    ("int4", "bfloat16", 64, 8, 4096, 14336),
]
# Scheme, tokens, how many experts each has, experts, features, hidden numbers.
MIXTURES = [
    *((kind, 16, 8, 16, 2048, 768) for kind in (None, *SCHEMES)),
    *((kind, 2048, 8, 16, 2048, 768) for kind in (None, "int8")),
    (None, 64, 2, 8, 4096, 14336),
]


@pytest.mark.parametrize(
    "topology",
    [
        pytest.param("v5e-1", marks=pytest.mark.slow),
        *(pytest.param(name, marks=pytest.mark.long) for name in ("v5p-8", "v6e-1", "tpu7x-1")),
    ],
)
def test_compiled(topology):
    """Fast memory suffices."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, topology, json.dumps(CASES), json.dumps(MIXTURES)],
        capture_output=True,
        text=True,
        env=os.environ | QUIET | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == len(CASES) + len(MIXTURES)
    assert all(figures["kernels"] == 1 for figures in lines), lines
