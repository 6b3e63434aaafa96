"""What the TPU's kernel is called with: against the kernel's own reference, which says what it does, on a CPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.ragged_paged_attention.kernel import (
    dynamic_validate_inputs,
    ref_ragged_paged_attention,
)

from jaxinfer.attention import AttentionSpec, LayerLayout
from jaxinfer.attention.tpu import TPU, attend_packed, attend_pools
from jaxinfer.cache import FullAttentionSpec, HeadMajorPages, InterleavedPages
from tests.attention.reference import Ragged, Shape, live, ragged, slots


def kernel(q, pages, lengths, table, starts, count, **options):
    """The reference, which wants what the kernel wants and gives only what is asked for; the rest is undefined."""
    dynamic_validate_inputs(q, pages, lengths, table, starts, count, **options)
    wanted = {name: options[name] for name in ("sm_scale", "sliding_window", "soft_cap", "k_scale", "v_scale")}
    out = ref_ragged_paged_attention(q, pages, lengths, table, starts, count, **wanted)
    return jnp.full(q.shape, jnp.nan, q.dtype).at[: out.shape[0]].set(out)


def packed(cache: HeadMajorPages, heads: int) -> InterleavedPages:
    """As the kernel wants it: with zeros up to so many heads, and 128 features."""
    pages, kept, size, head_dim = cache.k.shape
    padding = ((0, 0), (0, heads - kept), (0, 0), (0, 128 - head_dim))
    kv = np.stack([np.pad(np.asarray(pool), padding) for pool in cache], axis=2)  # [pages, K, 2, page_size, d]
    return InterleavedPages(jnp.asarray(kv.transpose(0, 3, 1, 2, 4).reshape(pages, size, 2 * heads, 128)))


def check(case: Ragged, spec: AttentionSpec, heads: int, error: float) -> None:
    out, cache = attend_packed(case.q, case.k, case.v, packed(case.cache, heads), case.batch, spec, kernel)
    used = live(case.batch)
    assert np.abs(np.asarray(out, np.float64) - case.out)[used].max(initial=0) < error
    assert not np.asarray(out, np.float32)[~used].any()
    np.testing.assert_array_equal(np.asarray(cache.kv)[1:], np.asarray(packed(case.after, heads).kv)[1:])


@pytest.mark.parametrize(
    ("shape", "window", "cap", "kept"),
    [
        (Shape(rows=3, heads=8, kv_heads=2), 20, 0.8, 2),
        pytest.param(
            *(Shape(rows=3, page_size=256, heads=6, kv_heads=3, head_dim=24), None, None, 4), marks=pytest.mark.slow
        ),
    ],
)
def test_matches_float64(shape, window, cap, kept):
    """Few rows: the reference compiles each operation for each length."""
    spec = AttentionSpec(shape.head_dim**-0.5, window=window, soft_cap=cap)
    check(ragged(shape, spec, [700, -1, 15], [], decode_only=True), spec, kept, error=2e-5)
    check(ragged(shape, spec, [640], [(0, 130), (17, 2)]), spec, kept, error=2e-5)


@pytest.mark.parametrize("each", [1, 2])
def test_pools_of_some_heads(each):
    """As heads of more than 128 have them: the last one with a head of padding."""
    shape = Shape(rows=3, heads=6, kv_heads=3)
    spec = AttentionSpec(0.25, window=20)
    case = ragged(shape, spec, [640], [(0, 130), (17, 2)])

    def pools(cache):
        parts = [type(cache)(*(pool[:, i : i + each] for pool in cache)) for i in range(0, 3, each)]
        return tuple(packed(part, each) for part in parts)

    out, after = attend_pools(case.q, case.k, case.v, pools(case.cache), case.batch, spec, kernel)
    assert np.abs(np.asarray(out, np.float64) - case.out)[live(case.batch)].max() < 2e-5
    assert len(after) == -(-3 // each)
    for one, expected in zip(after, pools(case.after), strict=True):
        np.testing.assert_array_equal(np.asarray(one.kv)[1:], np.asarray(expected.kv)[1:])


def test_a_cache_in_fp8():
    """Rounded as it is, as the kernel knows one scale only; what is too large is clipped, for there would be a NaN."""
    shape, spec = Shape(rows=3), AttentionSpec(0.25)
    case = ragged(shape, spec, [40, -1, 15], [], decode_only=True)
    v = case.v.at[0, 0, 0].set(1e4)
    pool = packed(case.cache, shape.kv_heads).kv.astype("float8_e4m3fn")

    def stands_for(x):
        return jnp.clip(x, -448, 448).astype("float8_e4m3fn").astype("float32")

    out, cache = attend_packed(case.q, case.k, v, InterleavedPages(pool), case.batch, spec, kernel)
    plain = InterleavedPages(pool.astype("float32"))
    expected, after = attend_packed(case.q, stands_for(case.k), stands_for(v), plain, case.batch, spec, kernel)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_array_equal(cache.kv.astype("float32")[1:], after.kv[1:])
    assert np.asarray(cache.kv, np.float32).max() == 448


def test_nobody_is_there():
    """A shard of rows that has nothing to do in this call: the kernel must be told of one row all the same."""
    shape, spec = Shape(), AttentionSpec(0.25)
    check(ragged(shape, spec, [], []), spec, shape.kv_heads, 1e-5)


class FakeDevice:
    def __init__(self, platform: str, device_kind: str = "none"):
        self.platform, self.device_kind = platform, device_kind


@pytest.mark.parametrize(
    ("platform", "heads", "head_dim", "dtype", "expected"),
    [
        ("cpu", 8, 128, "bfloat16", (False, 8, 128)),
        ("gpu", 8, 64, "bfloat16", (False, 8, 64)),
        ("tpu", 8, 128, "bfloat16", (True, 8, 128)),
        ("tpu", 1, 64, "bfloat16", (True, 1, 128)),  # padded
        ("tpu", 2, 80, "float32", (True, 2, 128)),
        ("tpu", 1, 256, "bfloat16", (True, 1, 256)),
        ("tpu", 3, 256, "bfloat16", (True, 3, 256)),  # in a pool each
        ("tpu", 1, 256, "float32", (False, 1, 256)),  # which the compiler does not take
        ("tpu", 3, 128, "bfloat16", (True, 4, 128)),  # to what fills tiles
        ("tpu", 12, 64, "bfloat16", (True, 16, 128)),
        ("tpu", 12, 64, "float32", (True, 12, 128)),
        ("tpu", 3, 128, "float32", (True, 4, 128)),
        ("tpu", 5, 128, "float32", (True, 8, 128)),
        ("tpu", 20, 128, "bfloat16", (True, 24, 128)),
        ("tpu", 8, 128, "float16", (False, 8, 128)),
    ],
)
def test_the_layout_suits_the_device(platform, heads, head_dim, dtype, expected):
    attention = "jax" if expected[0] else "auto"
    layout = LayerLayout.of(FullAttentionSpec(heads, head_dim), dtype, FakeDevice(platform), attention)
    assert (layout.backend is TPU, *layout.kept_heads) == expected
    first = layout.arrays(5, 16)
    nbytes = sum(np.prod(pool.shape) * pool.dtype.itemsize for pool in jax.tree.leaves(first))
    assert layout.nbytes(16) == nbytes / 5


def test_a_row_that_has_stopped():
    """A decoding row in a mixed call whose sequence has ended: it writes nothing, and nothing is asked of it."""
    shape, spec = Shape(), AttentionSpec(0.25)
    case = ragged(shape, spec, [40, 15, 300], [(0, 30)])
    lengths = case.batch.kv_lens.copy()
    lengths[1] = 0
    batch = dataclasses.replace(case.batch, kv_lens=lengths)
    out, cache = attend_packed(case.q, case.k, case.v, packed(case.cache, shape.kv_heads), batch, spec, kernel)
    used = live(batch)
    assert np.abs(np.asarray(out) - case.out)[used].max() < 2e-5
    assert not np.asarray(out)[1].any()
    page, _, slot = slots(batch.pages[1], 15, 16, 16)
    before = packed(case.cache, shape.kv_heads).kv
    np.testing.assert_array_equal(np.asarray(cache.kv)[page, slot], np.asarray(before)[page, slot])
