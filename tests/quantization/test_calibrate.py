"""Rounding with a look at the inputs: less error in the product, whatever the scheme."""

import numpy as np
import pytest

from jaxinfer.quantization.calibrate import (
    carrying,
    channel_factors,
    gptq,
    nearest,
    round_to_nearest,
    rounded_input,
    times,
)
from jaxinfer.quantization.schemes import SCHEMES


@pytest.fixture(scope="module")
def case():
    """Weights [192, 256], and inputs [1024, 256] that are correlated, and of which some are larger than others."""
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((256, 256)) * np.exp(rng.standard_normal(256))
    return (
        rng.standard_normal((192, 256)).astype(np.float32),
        (rng.standard_normal((1024, 256)) @ mix).astype(np.float32),
    )


def error(weight, x, rounded):
    return float(np.sum((x @ (rounded - weight).T) ** 2) / np.sum((x @ weight.T) ** 2))


@pytest.mark.parametrize(("scheme", "share"), [("int4", 0.5), ("int8", 0.4), ("fp8", 0.4)])
def test_gptq_is_better_than_rounding(case, scheme, share):
    weight, x = case
    size = np.mean(x**2, axis=0)
    plain = times(*round_to_nearest(weight, size, SCHEMES[scheme]))
    values, scales = gptq(weight, carrying(x.T @ x), SCHEMES[scheme])
    assert np.array_equal(nearest(values, SCHEMES[scheme]), values)
    assert scales.shape == (192, 256 // (SCHEMES[scheme].columns or 256))
    assert error(weight, x, times(values, scales)) < share * error(weight, x, plain)


def test_gptq_of_inputs_that_never_come(case):
    """Columns whose input is always zero are rounded like others, and nothing becomes infinite."""
    weight, x = case
    x = x.copy()
    x[:, ::3] = 0
    values, scales = gptq(weight, carrying(x.T @ x), SCHEMES["int4"])
    assert np.isfinite(times(values, scales)).all()
    assert np.abs(times(values, scales) - weight).max() < 2


def test_clipping_is_no_worse_than_not(case):
    weight, x = case
    size = np.mean(x**2, axis=0)
    clipped, plain = (times(*round_to_nearest(weight, size, SCHEMES["int4"], shrinks)) for shrinks in SHRINKS)
    assert error(weight, x, clipped) < error(weight, x, plain)


SHRINKS = (np.linspace(1, 0.7, 13, dtype=np.float32), np.ones(1, np.float32))


@pytest.mark.parametrize("scheme", ["int4", "int8-w8a8"])
def test_factors(case, scheme):
    """AWQ and SmoothQuant: what they do to channels makes the product better, and is the same for those that share."""
    weight, x = case
    x = x * np.where(np.arange(256) % 40 == 0, 30, 1).astype(np.float32)  # outliers
    scheme, size = SCHEMES[scheme], np.mean(x**2, axis=0)
    plain = times(*round_to_nearest(weight, size, scheme))
    factors = channel_factors([weight], x, scheme)
    better = times(*round_to_nearest(weight * factors, size / factors**2, scheme))
    exact = x @ weight.T
    before, after = (
        np.sum((rounded_input(inputs, scheme) @ rounded.T - exact) ** 2)
        for inputs, rounded in ((x, plain), (x / factors, better))
    )
    assert after < 0.8 * before
    shared = channel_factors([weight], x, scheme, (4, 8, 8)).reshape(4, 8, 8)
    assert (shared == shared[:, :1]).all()
    assert len(np.unique(shared)) > 8
