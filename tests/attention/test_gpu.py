"""The kernel for GPUs, interpreted on a CPU: against float64 numpy and attention in plain XLA. And lowered for CUDA."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax.experimental import pallas as pl

from jaxinfer.attention import AttentionSpec, LayerLayout, attend
from jaxinfer.attention.gpu import GPU
from jaxinfer.attention.paged import PAGED
from jaxinfer.attention.tpu_xla import XLA_ON_TPU
from jaxinfer.attention.xla import XLA
from jaxinfer.cache import FullAttentionSpec
from tests.attention.reference import Ragged, Shape, check_overflow, filled_outside, live
from tests.attention.reference import ragged as _ragged


@pytest.fixture(scope="module", autouse=True)
def _interpreted():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
        yield


run = jax.jit(attend, static_argnums=5)
ragged = functools.partial(_ragged, backend=GPU)


def check(case: Ragged, spec: AttentionSpec, error: float) -> None:
    """Everywhere but in the rows' own slots the pool is NaN, as somebody may have left it."""
    out, cache = run(case.q, case.k, case.v, filled_outside(case, np.nan), case.batch, spec)
    used = live(case.batch)
    assert np.abs(np.asarray(out, np.float64) - case.out)[used].max(initial=0) < error
    assert not np.asarray(out, np.float32)[~used].any()
    for pool, expected in zip(cache, filled_outside(case._replace(cache=case.after), np.nan), strict=True):
        np.testing.assert_array_equal(np.asarray(pool, np.float32)[1:], np.asarray(expected, np.float32)[1:])


CASES = {
    "head size 64, page 16": (Shape(heads=8, kv_heads=2, head_dim=64), None),
    "one key head, page 1, window": (Shape(page_size=1, heads=4, kv_heads=1, head_dim=16), 20),
    "one group, page 128": (Shape(page_size=128, heads=4, kv_heads=4, head_dim=32), None),
    "head size 128, three heads a group, page 24, window over blocks": (
        Shape(page_size=24, heads=6, kv_heads=2, head_dim=128),
        150,
    ),
    "head size 256, window 1": (Shape(heads=2, kv_heads=1, head_dim=256), 1),
    "bfloat16": (Shape(heads=14, kv_heads=2, head_dim=64, dtype="bfloat16"), None),
    "float16": (Shape(dtype="float16"), 100),
}
CAPS = {"bfloat16": 1.5, "head size 256, window 1": 0.5, "one key head, page 1, window": 0.3}
ERRORS = {"float32": 2e-6, "bfloat16": 2e-2, "float16": 3e-3}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "bfloat16" else pytest.mark.slow) for name in CASES]
)
def test_matches_float64(name):
    shape, window = CASES[name]
    spec = AttentionSpec(shape.head_dim**-0.5, window=window, soft_cap=CAPS.get(name))
    error = ERRORS[shape.dtype]
    check(ragged(shape, spec, [0, 15, 16, -1, 699, 127], [], decode_only=True), spec, error)
    check(ragged(shape, spec, [255, 640, -1], [(0, 130), (256, 100), (17, 2)]), spec, error)


def test_matches_float64_on_random_rows():
    shape, spec = Shape(heads=8, kv_heads=2), AttentionSpec(0.3, window=200, soft_cap=0.8)
    rng = np.random.default_rng(0)
    for seed in range(5):
        count = rng.integers(1, shape.rows + 1)
        decode = rng.integers(-1, 760, rng.integers(0, count + 1)).tolist()
        lengths = rng.multinomial(shape.tokens - 6, np.ones(7) / 7)[: count - len(decode)] + 1
        prefill = [(int(rng.integers(0, 768 - n)), int(n)) for n in lengths]
        check(ragged(shape, spec, decode, prefill, seed=seed), spec, 2e-6)
        check(ragged(shape, spec, rng.integers(-1, 767, 6).tolist(), [], seed=seed, decode_only=True), spec, 2e-6)


def test_nobody_is_there():
    shape, spec = Shape(), AttentionSpec(0.25)
    check(ragged(shape, spec, [], []), spec, 1e-6)
    check(ragged(shape, spec, [-1] * 6, [], decode_only=True), spec, 1e-6)


@pytest.mark.parametrize("decode_only", [True, False])
def test_a_row_that_has_stopped(decode_only):
    """It writes nothing, and nothing is asked of it."""
    shape, spec = Shape(), AttentionSpec(0.25)
    case = ragged(shape, spec, [40, 15, 300], [] if decode_only else [(0, 30)], decode_only=decode_only)
    lengths = case.batch.kv_lens.copy()
    lengths[1] = 0
    case = case._replace(batch=dataclasses.replace(case.batch, kv_lens=lengths))
    before = case.cache
    out, cache = run(case.q, case.k, case.v, before, case.batch, spec)
    used = live(case.batch)
    assert np.abs(np.asarray(out) - case.out)[used].max() < 2e-6
    assert not np.asarray(out)[1].any()
    own = case.batch.pages[1, :1]
    np.testing.assert_array_equal(np.asarray(cache.k)[own], np.asarray(before.k)[own])


@pytest.mark.parametrize("part", ["query", "key", "value"])
@pytest.mark.parametrize("decode_only", [True, False])
def test_a_row_that_overflows_harms_no_other(decode_only, part):
    check_overflow(run, GPU, decode_only, part)


class FakeDevice:
    def __init__(self, platform: str, compute_capability: str | None = None):
        self.platform, self.compute_capability, self.device_kind = platform, compute_capability, "none"


@pytest.mark.parametrize(
    ("attention", "device", "heads", "head_dim", "dtype", "expected"),
    [
        ("pallas", FakeDevice("gpu", "8.0"), 8, 128, "bfloat16", GPU),
        ("pallas", FakeDevice("gpu", "10.0"), 1, 64, "float16", GPU),
        ("auto", FakeDevice("gpu", "9.0"), 8, 128, "bfloat16", XLA),
        ("xla", FakeDevice("gpu", "9.0"), 8, 128, "bfloat16", XLA),
        ("xla", FakeDevice("tpu"), 8, 128, "bfloat16", XLA_ON_TPU),
        ("pallas", FakeDevice("gpu", "7.5"), 8, 128, "float16", "capability 8.0 and more, and this is a GPU of 7.5"),
        ("pallas", FakeDevice("gpu", "gfx942"), 8, 128, "float16", "and this is gpu"),
        ("pallas", FakeDevice("cpu"), 8, 128, "float32", "and this is cpu"),
        ("pallas", FakeDevice("gpu", "8.9"), 8, 128, "float32", "bfloat16 and float16, and dtype is float32"),
        (
            "pallas",
            FakeDevice("gpu", "8.9"),
            8,
            80,
            "bfloat16",
            "head sizes 16, 32, 64, 128, 256, and the model has 80",
        ),
        ("pallas", FakeDevice("tpu"), 3, 128, "bfloat16", PAGED),
        ("pallas", FakeDevice("tpu"), 8, 128, "float16", "for TPUs is for bfloat16 and float32, and dtype is float16"),
    ],
)
def test_what_is_asked_for_is_taken_or_refused(attention, device, heads, head_dim, dtype, expected):
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=f"attention is 'pallas': .*{expected}"):
            LayerLayout.of(FullAttentionSpec(heads, head_dim), dtype, device, attention)
    else:
        assert LayerLayout.of(FullAttentionSpec(heads, head_dim), dtype, device, attention).backend is expected


def test_what_the_kernel_does_not_know():
    """Sinks: plain XLA has them, and what was asked for is refused by name."""
    spec, device = FullAttentionSpec(8, 64, sinks=True), FakeDevice("gpu", "9.0")
    layout = LayerLayout.of(spec, "bfloat16", device)
    assert layout.backend is XLA
    assert "attention sinks, which the model has" in layout.in_words
    with pytest.raises(ValueError, match=r"attention is 'pallas': .* attention sinks, which the model has"):
        LayerLayout.of(spec, "bfloat16", device, "pallas")
