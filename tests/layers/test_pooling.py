"""One vector of a row's hidden states: as sentence-transformers defines it, and whatever else is in the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.attention import ForwardBatch
from jaxinfer.layers.pooling import POOLINGS, pool

SIZES, WIDTH, LENGTH = (4, 1, 9), 5, 20
RNG = np.random.default_rng(0)
ROWS = [RNG.standard_normal((size, WIDTH)).astype(np.float32) for size in SIZES]
SKIP = (2, 0, 3)
EXPECTED = {
    "cls": lambda x, weights: x[0],
    "max": lambda x, weights: x.max(axis=0),
    "mean": lambda x, weights: x.mean(axis=0),
    "mean_sqrt_len_tokens": lambda x, weights: x.sum(axis=0) / np.sqrt(len(x)),
    "weightedmean": lambda x, weights: (x * weights[:, None]).sum(axis=0) / weights.sum(),
    "lasttoken": lambda x, weights: x[-1],
}


def pooled(rows, kinds, skip=None):
    count = len(SIZES)
    batch = ForwardBatch.of_sequences([[7] * len(row) for row in rows] + [[]] * (count - len(rows)), LENGTH)
    stream = np.full((LENGTH, WIDTH), 1e4, np.float32)  # of padding
    stream[: sum(map(len, rows))] = np.concatenate(rows)
    skip = None if skip is None else jnp.asarray([*skip, *[0] * (count - len(rows))], jnp.int32)
    return np.asarray(jax.jit(lambda x, batch, skip: pool(x, batch, kinds, skip))(stream, batch, skip))


@pytest.mark.parametrize("skip", [None, SKIP])
@pytest.mark.parametrize("kind", POOLINGS)
def test_alone_and_together(kind, skip):
    together = pooled(ROWS, (kind,), skip)
    for i, row in enumerate(ROWS):
        first = 0 if skip is None else skip[i]
        expected = EXPECTED[kind](row[first:], np.arange(first + 1, len(row) + 1, dtype=np.float32))
        np.testing.assert_allclose(together[i], expected, rtol=1e-5, atol=1e-6)
        alone = pooled([row], (kind,), None if skip is None else [skip[i]])
        np.testing.assert_array_equal(alone[0], together[i])  # to the bit
        assert np.isfinite(alone).all()  # also of rows that are not there


def test_several_are_put_together():
    kinds = ("mean", "cls", "max")
    parts = [pooled(ROWS, (kind,)) for kind in kinds]
    np.testing.assert_array_equal(pooled(ROWS, kinds), np.concatenate(parts, axis=1))


def test_bfloat16_is_summed_in_float32():
    batch = ForwardBatch.of_sequences([[7] * 3000])
    ones = jnp.full((3000, 1), 1.0078125, jnp.bfloat16)  # summed in bfloat16 it would stop at 256
    assert float(pool(ones, batch, ("mean",))[0, 0]) == pytest.approx(1.0078125)
