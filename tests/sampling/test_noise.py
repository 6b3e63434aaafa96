"""Noise against JAX's generator, the published answers, and the distribution that it is to have."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry2x32_p
from scipy import stats

from jaxinfer.sampling.noise import gumbel, threefry


def test_threefry_is_the_published_one():
    """The known answers of Random123's kat_vectors, threefry2x32 with 20 rounds."""
    answers = {
        ((0, 0), (0, 0)): (0x6B200159, 0x99BA4EFE),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 2): (0x1CB996FC, 0xBB002BE7),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3)): (0xC4923A9C, 0x483DF7A0),
    }
    for (key, counter), answer in answers.items():
        ours = threefry(*(tuple(np.array([x], np.uint32) for x in pair) for pair in (key, counter)))
        assert tuple(int(x[0]) for x in ours) == answer


def test_threefry_is_jaxs():
    rng = np.random.default_rng(0)
    a, b, c, d = rng.integers(0, 2**32, (4, 1000), dtype=np.uint32)
    ours = jax.jit(threefry)((a, b), (c, d))
    np.testing.assert_array_equal(np.stack(ours), np.stack(threefry2x32_p.bind(*map(jnp.asarray, (a, b, c, d)))))


def test_the_distribution_and_what_it_depends_on():
    draw = jax.jit(gumbel, static_argnums=2)
    seeds = np.array([[1, 2], [1, 3], [2, 2], [1, 2]], np.uint32)
    noise = np.asarray(draw(seeds, np.array([5, 5, 5, 6], np.int32), 50_000))
    assert np.isfinite(noise).all()
    for row in noise:
        assert stats.kstest(row, "gumbel_r").pvalue > 1e-3
    assert np.abs(np.corrcoef(noise) - np.eye(4)).max() < 0.02
    again = np.asarray(draw(seeds[:1], np.array([5], np.int32), 1000))
    np.testing.assert_array_equal(again[0], noise[0, :1000])
