"""A cache in 8 bits: rounded once, by a scale for each token and head, and read as what that stands for."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxinfer.attention import AttentionSpec, LayerLayout, attend
from jaxinfer.attention.gpu import GPU
from jaxinfer.attention.tpu import TPU
from jaxinfer.cache import FullAttentionSpec, HeadMajorPages, QuantizedPages
from tests.attention.reference import Shape, live, ragged
from tests.attention.test_packed import FakeDevice

run = jax.jit(attend, static_argnums=5)
DTYPES = {"int8": (np.dtype(np.int8), 127), "fp8": (np.dtype(ml_dtypes.float8_e4m3fn), 448)}


def rounded(x: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Values and scales, in numpy."""
    dtype, most = DTYPES[name]
    scales = np.abs(x).max(axis=-1) / np.float32(most)
    values = x / scales[..., None]
    values = np.rint(values).astype(dtype) if name == "int8" else values.astype(dtype).view(np.uint8)
    return values, scales.astype(np.float32)


def product(values: np.ndarray, scales: np.ndarray, name: str) -> np.ndarray:
    return np.asarray(values).view(DTYPES[name][0]).astype(np.float32) * np.asarray(scales)[..., None]


def stands_for(x: np.ndarray, name: str) -> np.ndarray:
    return product(*rounded(np.asarray(x), name), name)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize(("decode", "prefill"), [([0, 15, -1, 699, 127], None), ([5, 640], [(0, 130), (256, 100)])])
def test_as_what_it_stands_for(name, decode, prefill):
    shape, spec = Shape(heads=4, kv_heads=2, head_dim=24), AttentionSpec(0.25, window=300)
    case = ragged(shape, spec, decode, prefill or [], decode_only=prefill is None, seed=3)
    (k, k_scales), (v, v_scales) = (rounded(np.asarray(pool), name) for pool in case.cache)
    out, cache = run(case.q, case.k, case.v, QuantizedPages(k, v, k_scales, v_scales), case.batch, spec)
    plain = HeadMajorPages(*(jnp.asarray(stands_for(pool, name)) for pool in case.cache))
    new = [jnp.asarray(stands_for(x, name)) for x in (case.k, case.v)]
    expected, after = run(case.q, *new, plain, case.batch, spec)
    used = live(case.batch)
    np.testing.assert_allclose(np.asarray(out)[used], np.asarray(expected)[used], atol=1e-5)
    assert np.abs(np.asarray(out) - case.out)[used].max() > 1e-4  # the rounding is there
    for pool, scales, reference in zip(cache[:2], cache[2:], after, strict=True):
        np.testing.assert_allclose(product(pool, scales, name)[1:], np.asarray(reference)[1:], rtol=1e-6)


@pytest.mark.parametrize("name", DTYPES)
def test_what_others_left_has_no_influence(name):
    shape, spec = Shape(), AttentionSpec(0.25)
    case = ragged(shape, spec, [3, 200], [(0, 300), (100, 7)])
    pools = [rounded(np.asarray(pool), name) for pool in case.cache]
    outs = []
    for garbage in (0.0, np.nan, np.inf):
        (k, k_scales), (v, v_scales) = ((values.copy(), scales.copy()) for values, scales in pools)
        unused = np.setdiff1d(np.arange(len(k)), np.asarray(case.batch.pages))
        k_scales[unused], v_scales[unused] = garbage, garbage
        k_scales[0], v_scales[0] = garbage, garbage
        out, _ = run(case.q, case.k, case.v, QuantizedPages(k, v, k_scales, v_scales), case.batch, spec)
        outs.append(np.asarray(out)[live(case.batch)])
    assert np.isfinite(outs[0]).all()
    np.testing.assert_array_equal(outs[0], outs[1])
    np.testing.assert_array_equal(outs[0], outs[2])


@pytest.mark.parametrize(
    ("platform", "heads", "name", "expected"),
    [
        ("cpu", 8, "int8", (QuantizedPages, 8, 2 * 8 * (64 + 4))),
        ("gpu", 8, "fp8", (QuantizedPages, 8, 2 * 8 * (64 + 4))),
        ("tpu", 8, "fp8", (None, 8, 2 * 8 * 128)),
        ("tpu", 3, "fp8", (None, 4, 2 * 4 * 128)),
    ],
)
def test_the_layout(platform, heads, name, expected):
    attention = "jax" if platform == "tpu" else "auto"
    layout = LayerLayout.of(FullAttentionSpec(heads, 64), "bfloat16", FakeDevice(platform), attention, name)
    pages, kept, nbytes = expected
    assert (layout.kept_heads[0], layout.dtype, layout.nbytes(1)) == (kept, DTYPES[name][0], nbytes)
    layer = layout.arrays(5, 16)
    assert pages in (None, type(layer))
    assert sum(np.prod(pool.shape) * pool.dtype.itemsize for pool in jax.tree.leaves(layer)) == 5 * 16 * nbytes


@pytest.mark.parametrize(
    ("platform", "heads", "attention", "name", "problem"),
    [
        ("tpu", 8, "jax", "int8", "take fp8, or leave `attention` out"),
        ("tpu", 1, "jax", "fp8", "saves nothing"),
        ("gpu", 8, "pallas", "int8", "on GPUs only attention='xla'"),
    ],
)
def test_what_there_is_no_kernel_for(platform, heads, attention, name, problem, monkeypatch):
    monkeypatch.setattr(type(GPU), "supports", lambda *_: None)
    with pytest.raises(ValueError, match=problem):
        LayerLayout.of(FullAttentionSpec(heads, 128), "bfloat16", FakeDevice(platform), attention, name)


def test_pools_of_wide_heads():
    """On TPUs: one in bfloat16, two in fp8, none in float32."""
    spec, device = FullAttentionSpec(4, 256), FakeDevice("tpu")
    for name, pools in (("auto", 4), ("fp8", 2)):
        layout = LayerLayout.of(spec, "bfloat16", device, "jax", name)
        assert layout.backend is TPU
        assert len(layout.arrays(3, 16)) == pools
    with pytest.raises(ValueError, match=r"reads heads of more than 128 in bfloat16 and fp8, and not in float32"):
        LayerLayout.of(spec, "float32", device, "jax")
