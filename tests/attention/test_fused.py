"""What tokamax's kernel is called with: against its own reference where it is installed, and one of ours."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import jaxinfer.attention.fused as fused_module
from jaxinfer.attention import AttentionSpec, LayerLayout
from jaxinfer.attention.fused import attend_fused
from jaxinfer.cache import FullAttentionSpec, FusedPages
from jaxinfer.sharding import KV, ROWS
from tests.attention.reference import Shape, attend_row, live, ragged
from tests.attention.test_packed import FakeDevice, packed


def ours(q, k, v, pool, lengths, table, starts, distribution, *, sm_scale, sliding_window, soft_cap):
    """As the kernel is documented: decoding rows have one token, all rows are written, the rest is undefined."""
    decoding, _, count = map(int, distribution)
    pool, out = np.array(pool), np.full(q.shape, np.nan, q.dtype)
    table = np.asarray(table).reshape(len(lengths), -1)
    width, size = q.shape[-1], pool.shape[1]
    for row in range(count):
        span = slice(int(starts[row]), int(starts[row + 1]))
        new, total = span.stop - span.start, int(lengths[row])
        assert 1 <= new <= total
        assert new == 1 or row >= decoding
        for token, position in zip(range(span.start, span.stop), range(total - new, total), strict=True):
            pair = np.stack([k[token], v[token]], axis=1)
            pool[table[row, position // size], position % size, ..., :width] = pair
        kv = pool[table[row]].reshape(-1, *pool.shape[2:])[:total, ..., :width]
        spec = AttentionSpec(sm_scale, window=sliding_window, soft_cap=soft_cap)
        out[span] = attend_row(np.asarray(q[span]), kv[:, :, 0], kv[:, :, 1], spec)
    return jnp.asarray(out), jnp.asarray(pool)


def theirs(*args, **options):
    """Their reference takes the pool without the axis of keys and values."""
    tokamax = pytest.importorskip("tokamax")
    q, k, v, pool, *rest = map(jnp.asarray, args)
    flat = pool.reshape(*pool.shape[:2], -1, pool.shape[-1])
    out, kv = tokamax.ops.ragged_paged_attention(q, k, v, flat, *rest, implementation="reference", **options)
    return out, kv.reshape(pool.shape)


def fused(cache):
    kv = packed(cache, cache.k.shape[1]).kv
    pages, size, pairs, width = kv.shape
    return FusedPages(kv.reshape(pages, size, pairs // 2, 2, width))


@pytest.mark.parametrize("kernel", [ours, theirs])
@pytest.mark.parametrize(("window", "cap"), [(None, None), (20, 0.8)])
def test_matches_float64(kernel, window, cap):
    shape = Shape(rows=3, heads=8, tokens=160)
    spec = AttentionSpec(shape.head_dim**-0.5, window=window, soft_cap=cap)
    for decode, prefill, only in (([700, 0, 15], [], True), ([640], [(0, 130), (17, 2)], False), ([], [], False)):
        case = ragged(shape, spec, decode, prefill, decode_only=only)
        out, cache = attend_fused(case.q, case.k, case.v, fused(case.cache), case.batch, spec, kernel)
        used = live(case.batch)
        assert np.abs(np.asarray(out, np.float64) - case.out)[used].max(initial=0) < 2e-5
        assert not np.asarray(out)[~used].any()
        np.testing.assert_array_equal(np.asarray(cache.kv)[1:], np.asarray(fused(case.after).kv)[1:])


@pytest.mark.parametrize("kernel", [ours, theirs])
@pytest.mark.parametrize("decode_only", [False, True])
def test_a_row_that_has_stopped(kernel, decode_only):
    """It has a token in the stream all the same. Of its pages none is written."""
    shape, spec = Shape(rows=4, tokens=64), AttentionSpec(0.25)
    case = ragged(shape, spec, [40, 15], [] if decode_only else [(300, 30)], decode_only=decode_only)
    lengths = case.batch.kv_lens.copy()
    lengths[1] = 0
    batch = dataclasses.replace(case.batch, kv_lens=lengths)
    out, cache = attend_fused(case.q, case.k, case.v, fused(case.cache), batch, spec, kernel)
    used = live(batch)
    assert np.abs(np.asarray(out) - case.out)[used].max() < 2e-5
    assert not np.asarray(out)[1].any()
    own = batch.pages[1][batch.pages[1] > 0]
    np.testing.assert_array_equal(np.asarray(cache.kv)[own], np.asarray(fused(case.cache).kv)[own])


@pytest.mark.parametrize(
    ("version", "kind", "dtype", "expected"),
    [
        ("0.0.17", "TPU v5 lite", "bfloat16", FusedPages),
        ("0.1.0", "TPU7x", "bfloat16", FusedPages),
        ("0.0.16", "TPU v6 lite", "bfloat16", "it is not installed"),
        (None, "TPU v6 lite", "bfloat16", "it is not installed"),
        ("0.0.17", "TPU v4", "bfloat16", "for v5 and later"),
        ("0.0.17", "TPU v6 lite", "float32", "a cache in bfloat16"),
    ],
)
def test_where_it_is_used(monkeypatch, version, kind, dtype, expected):
    def installed(name):
        if version is None:
            raise fused_module.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(fused_module, "version", installed)
    device = FakeDevice("tpu", kind)
    for heads, head_dim, problem in ((12, 64, "it pads no heads"), (1, 256, "heads of more than 128")):
        with pytest.raises(ValueError, match=f"attention is 'tokamax': .*{problem}"):
            LayerLayout.of(FullAttentionSpec(heads, head_dim), "bfloat16", FakeDevice("tpu", "TPU v6 lite"), "tokamax")
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=f"attention is 'tokamax': .*{expected}"):
            LayerLayout.of(FullAttentionSpec(8, 64), dtype, device, "tokamax")
        return
    layout = LayerLayout.of(FullAttentionSpec(8, 64), dtype, device, "tokamax")
    pools = layout.arrays(5, 16)
    assert type(pools) is expected
    assert layout.backend.partition_spec == PartitionSpec(ROWS, None, KV)
    assert pools.kv.shape == (5, 16, 8, 2, 128)
    assert layout.nbytes(1) == np.prod(pools.kv.shape) * 2 / (5 * 16)
