"""A mixture of experts over a mesh, against one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxinfer.layers.experts import SparseMLP
from jaxinfer.layers.router import Routing
from jaxinfer.layers.stack import _axes
from jaxinfer.plan.collectives import collectives
from jaxinfer.quantization.quantize import quantize
from jaxinfer.quantization.schemes import SCHEMES
from jaxinfer.sharding import ROWS, make_mesh, on_axes, padded, partition
from jaxinfer.weights import QArray

RNG = np.random.default_rng(3)
WIDTH, TOKENS = 32, 16


def block(quantization=None, **options):
    """All of whose parameters are random."""
    mlp = SparseMLP(WIDTH, 24, routing=Routing(11, 3), activation="silu", dtype="float32", rngs=nnx.Rngs(0), **options)
    for path, variable in nnx.to_flat_state(nnx.state(mlp)):
        value = variable.get_value()
        leaves, tree = jax.tree.flatten(value)
        value = jax.tree.unflatten(tree, [jnp.asarray(RNG.normal(size=leaf.shape), leaf.dtype) for leaf in leaves])
        if quantization and path[0] == "shared_expert" and path[-1] == "weight":
            scheme = SCHEMES[quantization]
            value = QArray(*map(jnp.asarray, quantize(np.asarray(value.array), scheme)), scheme, value.axes)
        variable.set_value(value)
        nnx.update(mlp, nnx.from_flat_state([(path, variable)]))
    return mlp


@functools.cache
def on_one(quantization, shared):
    mlp = block(quantization, **dict(shared))
    x = RNG.normal(size=(TOKENS, WIDTH)).astype(np.float32)
    live = np.arange(TOKENS) % 5 != 2
    return mlp, x, live, np.asarray(jax.jit(lambda mlp, x, live: mlp(x, live))(mlp, x, live))


@pytest.mark.parametrize("mesh", ["tensor=8", "data=2,tensor=4", "fsdp=2,tensor=4", "data=4,tensor=2,expert=4"])
@pytest.mark.parametrize(
    ("quantization", "shared"),
    [
        (None, {}),
        (None, {"shared": 48, "shared_bias": True}),
        ("int8-w8a8", {"shared": 48, "shared_gate": True, "shared_bias": True}),
        ("int8", {"shared": 48, "shared_gate": True}),
    ],
)
def test_over_a_mesh(mesh, quantization, shared):
    """One reduction in all, with the shared expert's; where shards of rows share experts their tokens go there and
    back. 11 experts are padded."""
    mlp, x, live, expected = on_one(quantization, tuple(shared.items()))
    devices = make_mesh(mesh, jax.devices(), 8, 8, WIDTH, experts=True)
    graph, state = nnx.split(mlp)
    flat = nnx.to_flat_state(state)
    axes = [names for _, variable in flat for names in _axes(variable)]
    arrays, tree = jax.tree.flatten([variable.get_value() for _, variable in flat])
    # fsdp gathers what it splits before a layer sees it.
    axes = [tuple(None if axis == "embed" else axis for axis in names) for names in axes]
    placed = []
    for array, names in zip(arrays, axes, strict=True):
        shape = padded(array.shape, names, devices, (1,) * array.ndim)
        array = np.pad(array, [(0, new - old) for old, new in zip(array.shape, shape, strict=True)])
        placed.append(jax.device_put(array, NamedSharding(devices, partition(names))))

    def run(arrays, x, live):
        values = jax.tree.unflatten(tree, arrays)
        merged = [(path, variable.replace(value)) for (path, variable), value in zip(flat, values, strict=True)]
        return nnx.merge(graph, nnx.from_flat_state(merged))(x, live)

    rows = PartitionSpec(ROWS)
    specs = [on_axes(names, ROWS) for names in axes], rows, rows
    over = jax.shard_map(run, mesh=devices, axis_names=set(ROWS), in_specs=specs, out_specs=rows, check_vma=False)
    whole = [jax.device_put(array, NamedSharding(devices, rows)) for array in (x, live)]
    compiled = jax.jit(over).lower(placed, *whole).compile()
    np.testing.assert_allclose(compiled(placed, *whole), expected, atol=1e-3, rtol=1e-4)
    counts = {kind: total.count for kind, total in collectives(compiled.as_text()).items()}
    gathered = {} if mesh == "tensor=8" else {"all-gather": 2, "reduce-scatter": 1}
    # Activations that are rounded with one scale for all have its largest one first.
    assert counts == gathered | {"all-reduce": 1 + (quantization == "int8-w8a8")}
