"""Products by experts on TPUs: the kernel, interpreted, against the loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.kernels import tpu
from jaxinfer.weights import Dense
from jaxinfer.weights.weight import by_tiles

RNG = np.random.default_rng(0)
# Rows in all, and of each expert; the rest is nobody's.
SIZES = [(40, (3, 0, 5, 1)), (300, (130, 0, 7, 163)), (300, (0, 1, 127, 2)), (200, (0, 200, 0, 0)), (7, (0, 0, 0, 0))]


@pytest.mark.parametrize(("rows", "sizes"), SIZES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kernel_is_the_loop(rows, sizes, dtype):
    """Rows and outputs that its tiles don't divide; what is nobody's matters to nobody, and is zeros."""
    outs, ins = 640, 384
    x = RNG.normal(size=(rows, ins)).astype(jnp.dtype(dtype))
    x[sum(sizes) :] = np.nan
    x, weight = jnp.asarray(x), jnp.asarray(RNG.normal(size=(len(sizes), outs, ins)), dtype)
    counts = jnp.asarray(sizes, jnp.int32)
    assert tpu.multiplies(x, weight)
    out = tpu.grouped_product(x, counts, weight, interpret=True)
    (expected,) = jax.jit(by_tiles)(x, counts, [Dense(weight)])
    assert out.dtype == jnp.float32
    assert not np.asarray(out)[sum(sizes) :].any()
    np.testing.assert_allclose(out, expected, atol=1e-3)


def test_inputs_in_several_tiles(monkeypatch):
    """The last of which is cut."""
    monkeypatch.setattr(tpu, "ROWS_BYTES", 2 * 128 * 256 * 4)
    monkeypatch.setattr(tpu, "WEIGHT_BYTES", 2 * 128 * 256 * 4)
    x = jnp.asarray(RNG.normal(size=(70, 640)), "float32")
    weight, counts = jnp.asarray(RNG.normal(size=(3, 256, 640)), "float32"), jnp.asarray([40, 0, 20], jnp.int32)
    assert tpu.tiling(70, 256, 640, 4) == (80, 256, 128)
    (expected,) = by_tiles(x, counts, [Dense(weight)])
    np.testing.assert_allclose(tpu.grouped_product(x, counts, weight, interpret=True), expected, atol=1e-3)


@pytest.mark.parametrize(
    ("rows", "outs", "ins", "itemsize"),
    [(512, 768, 2048, 2), (8192, 2048, 768, 2), (8, 1536, 4096, 2), (9000, 2048, 7168, 4), (64, 4096, 14336, 2)],
)
def test_tiles_fit_into_fast_memory(rows, outs, ins, itemsize):
    m, k, n = tpu.tiling(rows, outs, ins, itemsize)
    assert m % 16 == k % 128 == n % 128 == 0
    assert k <= ins
    assert -(-outs // n) * n < outs + n
    assert 2 * itemsize * (m * k + n * k) + 3 * 4 * m * n < 13 * 2**20


def test_what_it_is_not_for():
    x, weight = jnp.zeros((8, 128), "bfloat16"), jnp.zeros((2, 128, 128), "bfloat16")
    assert tpu.multiplies(x, weight)
    assert not tpu.multiplies(x.astype("float16"), weight.astype("float16"))
    assert not tpu.multiplies(x.astype("float32"), weight)
    assert not tpu.multiplies(x[:, :64], weight[..., :64])
