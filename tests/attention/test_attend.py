"""The XLA attention against float64 numpy, on ragged batches with shuffled pages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.attention import AttentionSpec, ForwardBatch, Table, attend
from jaxinfer.attention.tpu_xla import XLA_ON_TPU
from jaxinfer.attention.xla import XLA
from jaxinfer.cache import BITS, HeadMajorPages
from tests.attention.reference import Ragged, Shape, attend_row, check_overflow, filled_outside, live, ragged

run = jax.jit(attend, static_argnums=5)

# Histories of decoding rows (-1: an unused row among them), and (history, new tokens) of prompts. Contexts span several
# blocks of keys, prompts several tiles of queries; lengths lie on, before and after the edges of pages and blocks.
DECODE_ONLY = [
    ([0, 15, 16, -1, 699, 127], []),
    ([255, -1, -1, 256, 128, 1], []),
    ([700, 701, 702, 703, 704, 705], []),
]
MIXED = [
    ([3, 128, 700], []),
    ([], [(0, 300), (0, 1), (0, 16), (0, 2)]),
    ([5, 640], [(0, 130), (256, 100), (17, 2), (255, 129)]),
    ([], [(383, 384)]),
    ([0, 0, 0, 0, 0], [(100, 28)]),
]
CASES = {
    "page 1": (Shape(page_size=1), None),
    "page 8, one group": (Shape(page_size=8, heads=4, kv_heads=4, head_dim=8), None),
    "page 16, window": (Shape(page_size=16, heads=8, kv_heads=2), 20),
    "page 128, one key head, window over blocks": (Shape(page_size=128, heads=3, kv_heads=1, head_dim=64), 150),
    "page 256, above a block": (Shape(page_size=256, heads=6, kv_heads=3, head_dim=24), None),
    "page 24, no divisor of a block, window 1": (Shape(page_size=24, head_dim=12), 1),
    "bfloat16": (Shape(dtype="bfloat16"), None),
}


def check(case: Ragged, spec: AttentionSpec, error: float, sinks: np.ndarray | None = None) -> None:
    kept = HeadMajorPages(*(np.asarray(pool).view(BITS.get(pool.dtype, pool.dtype)) for pool in case.cache))
    out, cache = run(case.q, case.k, case.v, kept, case.batch, spec, sinks)
    used = live(case.batch)
    assert np.abs(np.asarray(out, np.float64) - case.out)[used].max() < error
    assert np.isfinite(np.asarray(out, np.float32)).all()
    for pool, expected in zip(cache, case.after, strict=True):
        # Page 0 takes what padding writes; in all others, only the new tokens' slots may differ from before.
        np.testing.assert_array_equal(np.asarray(pool).view(expected.dtype)[1:], expected[1:])


@pytest.mark.parametrize("name", CASES)
def test_matches_float64(name):
    shape, window = CASES[name]
    spec = AttentionSpec(shape.head_dim**-0.5, window=window)
    error = 2e-6 if shape.dtype == "float32" else 2e-2
    for seed, (decode, prefill) in enumerate(DECODE_ONLY):
        check(ragged(shape, spec, decode, prefill, seed=seed, decode_only=True), spec, error)
    for seed, (decode, prefill) in enumerate(MIXED):
        check(ragged(shape, spec, decode, prefill, seed=seed), spec, error)


def test_matches_float64_on_random_rows():
    shape, spec = CASES["page 16, window"][0], AttentionSpec(0.3, window=20, soft_cap=0.8)
    rng = np.random.default_rng(0)
    for seed in range(20):
        count = rng.integers(1, shape.rows + 1)
        decode = rng.integers(0, 760, rng.integers(0, count + 1)).tolist()
        lengths = rng.multinomial(shape.tokens - 6, np.ones(7) / 7)[: count - len(decode)] + 1
        prefill = [(int(rng.integers(0, 768 - n)), int(n)) for n in lengths]
        check(ragged(shape, spec, decode, prefill, seed=seed), spec, 2e-6)


@pytest.mark.parametrize("window", [None, 20])
def test_sinks(window):
    """Scores of what has no value: less than any other, like them, and more by far, so that nothing is left."""
    shape, sinks = Shape(heads=4, kv_heads=2), np.array([-40.0, 0.7, 3.0, 200.0], np.float32)
    spec = AttentionSpec(shape.head_dim**-0.5, window=window)
    for decode, prefill in (DECODE_ONLY[0], MIXED[2]):
        case = ragged(shape, spec, decode, prefill, decode_only=not prefill, sinks=sinks)
        check(case, spec, 2e-6, sinks)
        assert not np.any(case.out[:, 3] > 1e-30)
    batch = ForwardBatch.of_sequences([[0] * 50], length=64)
    out, _ = run(case.q[:64], case.k[:64], case.v[:64], None, batch, spec, sinks)
    expected = attend_row(*(np.asarray(x)[:50] for x in (case.q, case.k, case.v)), spec, sinks)
    np.testing.assert_allclose(np.asarray(out)[:50], expected, atol=2e-6)


@pytest.mark.parametrize("name", ["page 16, window", "page 256, above a block", "bfloat16"])
def test_as_it_is_on_tpus(name):
    """With pools of 128 lanes, which are written row by row."""
    shape, window = CASES[name]
    spec, sinks = AttentionSpec(shape.head_dim**-0.5, window=window), np.linspace(-1, 3, shape.heads)
    for decode, prefill in (DECODE_ONLY[0], MIXED[2]):
        case = ragged(
            shape, spec, decode, prefill, decode_only=not prefill, backend=XLA_ON_TPU, sinks=sinks.astype(np.float32)
        )
        more = (0, 0), (0, 0), (0, 0), (0, 128 - shape.head_dim)
        kept = HeadMajorPages(
            *(np.pad(np.asarray(pool).view(BITS.get(pool.dtype, pool.dtype)), more) for pool in case.cache)
        )
        out, cache = run(case.q, case.k, case.v, kept, case.batch, spec, sinks.astype(np.float32))
        used = live(case.batch)
        assert np.abs(np.asarray(out, np.float64) - case.out)[used].max() < (2e-2 if name == "bfloat16" else 2e-6)
        for pool, expected in zip(cache, case.after, strict=True):
            kept = np.asarray(pool).view(expected.dtype)[1:]
            np.testing.assert_array_equal(kept[..., : shape.head_dim], expected[1:])
            assert not np.any(kept[..., shape.head_dim :])


@pytest.mark.parametrize("decode_only", [True, False])
def test_what_others_left_in_the_pool_has_no_influence(decode_only):
    shape, spec = Shape(), AttentionSpec(0.25)
    rows = ([0, 15, -1, 699, 200], []) if decode_only else ([3, 200], [(0, 300), (100, 7)])
    case = ragged(shape, spec, *rows, decode_only=decode_only)
    used = live(case.batch)
    expected, _ = run(case.q, case.k, case.v, case.cache, case.batch, spec)
    for value in (3e38, np.inf, np.nan):
        cache = filled_outside(case, value)
        out, _ = run(case.q, case.k, case.v, cache, case.batch, spec)
        np.testing.assert_array_equal(np.asarray(out)[used], np.asarray(expected)[used])


@pytest.mark.parametrize("part", ["query", "key", "value"])
@pytest.mark.parametrize("decode_only", [True, False])
def test_a_row_that_overflows_harms_no_other(decode_only, part):
    check_overflow(run, XLA, decode_only, part)


@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize("causal", [True, False])
def test_without_a_cache(causal, window):
    spec = AttentionSpec(0.3, causal=causal, window=window)
    lengths = [5, 1, 70, 33]
    batch = ForwardBatch.of_sequences([[0] * n for n in lengths], length=128)
    rng = np.random.default_rng(0)
    q = rng.standard_normal((128, 4, 8)).astype(np.float32)
    k, v = (rng.standard_normal((128, 2, 8)).astype(np.float32) for _ in range(2))
    out, cache = run(*map(jnp.asarray, (q, k, v)), None, batch, spec)
    assert cache is None
    for start, length in zip(np.cumsum([0, *lengths]), lengths, strict=False):
        row = slice(start, start + length)
        np.testing.assert_allclose(np.asarray(out)[row], attend_row(q[row], k[row], v[row], spec), atol=2e-6)


@pytest.mark.parametrize("window", [None, 50])
def test_in_pieces_as_in_one_go(window):
    """Prefill in chunks, then decode, over one pool: what attention without a cache gives at once."""
    spec, length = AttentionSpec(0.3, window=window), 260
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((length, 4, 16)).astype(np.float32))
    k, v = (jnp.asarray(rng.standard_normal((length, 2, 16)).astype(np.float32)) for _ in range(2))
    whole, _ = run(q, k, v, None, ForwardBatch.of_sequences([[0] * length]), spec)
    pages = np.random.default_rng(1).permutation(np.arange(1, 40))[:20].astype(np.int32)[None]
    cache = HeadMajorPages(*(jnp.full((40, 2, 16, 16), jnp.nan) for _ in range(2)))
    start, tokens = 0, 128
    for count in (100, 28, 1, 128, 1, 1, 1):
        decode_only = count == 1
        width = 1 if decode_only else tokens
        batch = ForwardBatch(
            tokens=np.zeros(width, np.int32),
            positions=np.pad(np.arange(start, start + count, dtype=np.int32), (0, width - count)),
            segment_ids=np.zeros(width, np.int32),
            cu_q_lens=np.array([0, count], np.int32),
            kv_lens=np.array([start + count], np.int32),
            tables=(Table(pages),),
            distribution=np.array([decode_only, 1, 1], np.int32),
            decode_only=decode_only,
            backend=XLA,
        )
        padding = ((0, width - count), (0, 0), (0, 0))
        piece = (jnp.pad(a[start : start + count], padding, constant_values=jnp.nan) for a in (q, k, v))
        out, cache = run(*piece, cache, batch, spec)
        np.testing.assert_allclose(np.asarray(out)[:count], np.asarray(whole)[start : start + count], atol=2e-6)
        start += count
    assert start == length


def test_both_directions_need_no_cache():
    case = ragged(Shape(), AttentionSpec(0.25), [3], [], decode_only=True)
    with pytest.raises(ValueError, match="pass cache=None"):
        attend(case.q, case.k, case.v, case.cache, case.batch, AttentionSpec(0.25, causal=False))


def test_of_sequences_refuses_a_stream_that_is_too_short():
    with pytest.raises(ValueError, match="length 3 is less than the 5 tokens"):
        ForwardBatch.of_sequences([[1, 2], [3, 4, 5]], length=3)
