"""The kernel of our own for TPUs in JAX's interpreter of them, against float64 numpy: races are found, memory that
nobody wrote is NaN, and reading what is not there raises."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxinfer.attention import AttentionSpec, LayerLayout, Relative, paged_kernel
from jaxinfer.attention.paged import PAGED, columns, scale_rows
from jaxinfer.attention.paged_kernel import attend_rows_in_place
from jaxinfer.attention.tpu import TPU
from jaxinfer.attention.tpu_xla import XLA_ON_TPU
from jaxinfer.cache import FullAttentionSpec, HeadMajorPages, QuantizedRowPages, RowPages
from jaxinfer.quantization.activations import quantize_last
from tests.attention.reference import Ragged, Shape, attend_row, check_overflow, filled_outside, live
from tests.attention.reference import ragged as _ragged
from tests.attention.test_packed import FakeDevice

INTERPRETED = functools.partial(pl.pallas_call, interpret=pltpu.InterpretParams(detect_races=True))
NOWHERE = 2**20  # a page that isn't there
ERRORS = {"float32": 3e-6, "bfloat16": 2e-2}
kernel = jax.jit(attend_rows_in_place, static_argnums=5)
ragged = functools.partial(_ragged, backend=PAGED)


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch, capsys):
    """With few keys and queries at a time, so that short rows have several blocks of them."""
    monkeypatch.setattr(pl, "pallas_call", INTERPRETED)
    monkeypatch.setattr(paged_kernel, "KEYS", 64)
    monkeypatch.setattr(paged_kernel, "QUERIES", 16)
    yield
    assert "RACE" not in capsys.readouterr().out


def packed(cache: HeadMajorPages, kept: np.dtype | None = None) -> RowPages | QuantizedRowPages:
    """As the kernel has it; with scales, if it is kept in another dtype."""
    k, v = (jnp.asarray(pool) for pool in cache)
    pages, heads, size, head_dim = k.shape
    pairs, scales = jnp.stack([k, v], axis=2).reshape(pages, 2 * heads, size, head_dim), None
    if kept is not None:
        pairs, scales = quantize_last(pairs, kept)
        more = scale_rows(heads, size) * 128 - 2 * heads * size
        scales = jnp.pad(scales.reshape(pages, -1), ((0, 0), (0, more))).reshape(pages, -1, 128)
    count = columns(heads, head_dim)
    rows = pairs.swapaxes(1, 2).reshape(pages, size, -1)
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, 128 * count - rows.shape[-1])))
    kv = rows.reshape(pages, size, count, 128).swapaxes(1, 2)
    return RowPages(kv) if scales is None else QuantizedRowPages(kv, scales)


def unpacked(cache: RowPages | QuantizedRowPages, heads: int, head_dim: int) -> HeadMajorPages:
    """What it stands for."""
    pages, _, size, _ = cache.kv.shape
    rows = np.asarray(cache.kv, np.float32).swapaxes(1, 2).reshape(pages, size, -1)[..., : 2 * heads * head_dim]
    pairs = rows.reshape(pages, size, heads, 2, head_dim).transpose(0, 3, 2, 1, 4)
    for scales in cache[1:]:
        scales = np.asarray(scales).reshape(pages, -1)[:, : 2 * heads * size].reshape(pages, heads, 2, size)
        pairs = pairs * scales.swapaxes(1, 2)[..., None]
    return HeadMajorPages(pairs[:, 0], pairs[:, 1])


def unseen(case: Ragged, spec: AttentionSpec) -> np.ndarray:
    """The page table, where pages that no query sees are not there."""
    size, pages = case.cache.k.shape[2], np.array(case.batch.pages)
    for row, length in enumerate(case.batch.kv_lens):
        first = length - int(np.diff(case.batch.cu_q_lens)[row])
        seen = 0 if spec.window is None else max(0, first - spec.window + 1) // size
        pages[row, :seen] = pages[row, -(-int(length) // size) :] = NOWHERE
    return pages


def expected(case: Ragged, cache: HeadMajorPages, spec: AttentionSpec, **more: np.ndarray) -> np.ndarray:
    """By what is in the pool after the call."""
    out = np.zeros(case.q.shape)
    for row, length in enumerate(case.batch.kv_lens):
        if length:
            span = slice(*case.batch.cu_q_lens[row : row + 2])
            own = case.batch.pages[row]
            k, v = (np.concatenate(list(pool[own].swapaxes(1, 2)))[:length] for pool in cache)
            out[span] = attend_row(np.asarray(case.q[span]), k, v, spec, **more)
    return out


def check(
    case: Ragged,
    spec: AttentionSpec,
    kept: np.dtype | None = None,
    sinks: np.ndarray | None = None,
    slopes: np.ndarray | None = None,
) -> None:
    """Elsewhere than in the rows' own slots the pool is NaN, or has scales that are, as somebody may have left it."""
    pool, dtype = packed(filled_outside(case, np.nan), kept), str(case.q.dtype)
    batch = dataclasses.replace(
        case.batch, tables=(dataclasses.replace(case.batch.tables[0], pages=unseen(case, spec)),)
    )
    out, after = kernel(case.q, case.k, case.v, pool, batch, spec, sinks, slopes)
    heads, head_dim = case.k.shape[1:]
    stands_for, more = unpacked(after, heads, head_dim), {}
    if slopes is not None:
        distance = np.arange(-1000, 1001)
        more["relative"] = Relative(bias=slopes[:, None] * distance)
    used, want = live(case.batch), expected(case, stands_for, spec, sinks=sinks, **more)
    assert np.abs(np.asarray(out, np.float64) - want)[used].max(initial=0) < ERRORS[dtype]
    assert not np.asarray(out, np.float32)[~used].any()
    written = filled_outside(case._replace(cache=case.after), np.nan)
    if kept is None:
        for pool, reference in zip(stands_for, written, strict=True):
            np.testing.assert_array_equal(pool[1:], np.asarray(reference, np.float32)[1:])
        return
    for part, reference in zip(after, packed(written, kept), strict=True):
        np.testing.assert_array_equal(*(np.asarray(x, np.float32)[1:] for x in (part, reference)))


SMALL = Shape(tokens=64, rows=4, context=192, heads=4, kv_heads=2, head_dim=64)
# Histories of decoding rows (-1: an unused row among them), and (history, new tokens) of prompts and drafts.
DECODE = [0, 15, -1, 180]
MIXED = [130, 16], [(0, 33), (150, 5)]
DRAFTS = [], [(100, 4), (37, 4), (0, 4), (60, 5)]


def test_decodes():
    check(ragged(SMALL, spec := AttentionSpec(0.2), DECODE, [], decode_only=True), spec)


def test_chunks_beside_decoding():
    """With all that there is."""
    spec, rng = AttentionSpec(0.2, window=40, soft_cap=0.8), np.random.default_rng(0)
    sinks, slopes = (rng.standard_normal(4).astype(np.float32) for _ in range(2))
    shape = SMALL._replace(dtype="bfloat16")
    check(ragged(shape, spec, *MIXED), spec, np.dtype(np.int8), sinks * 3, abs(slopes) * 0.1)


CASES = {
    "head size 64, page 8": (SMALL._replace(page_size=8), {}, None),
    "head size 64, window": (SMALL, {"window": 20}, None),
    "window 1": (SMALL, {"window": 1}, None),
    "window over blocks": (SMALL._replace(heads=2, kv_heads=2), {"window": 100}, None),
    "one key head of 64": (SMALL._replace(heads=3, kv_heads=1), {}, None),
    "head size 16": (SMALL._replace(head_dim=16), {}, None),
    "head size 80": (SMALL._replace(head_dim=80, kv_heads=4), {"soft_cap": 1.0}, None),
    "head size 96": (SMALL._replace(head_dim=96, heads=6, kv_heads=3), {}, None),
    "head size 128, page 128": (SMALL._replace(head_dim=128, page_size=128), {}, None),
    "head size 192": (SMALL._replace(head_dim=192), {}, None),
    "head size 256": (SMALL._replace(head_dim=256, heads=2), {"window": 70}, None),
    "bfloat16": (SMALL._replace(dtype="bfloat16", head_dim=128), {}, None),
    "bfloat16, head size 64": (SMALL._replace(dtype="bfloat16"), {"soft_cap": 2.0}, None),
    "int8": (SMALL, {"window": 50}, "int8"),
    "int8, page 128": (SMALL._replace(page_size=128, head_dim=128), {}, "int8"),
    "int8, page 256, one key head": (SMALL._replace(page_size=256, kv_heads=1, context=256), {}, "int8"),
    "int8, bfloat16, head size 96": (SMALL._replace(dtype="bfloat16", head_dim=96), {}, "int8"),
    "fp8": (SMALL._replace(head_dim=128), {}, "float8_e4m3fn"),
    "fp8, bfloat16, head size 192": (SMALL._replace(dtype="bfloat16", head_dim=192), {"window": 33}, "float8_e4m3fn"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_matches_float64(name):
    shape, options, kept = CASES[name]
    spec, kept = AttentionSpec(shape.head_dim**-0.5, **options), kept and jnp.dtype(kept)
    sinks, slopes = (np.linspace(*ends, shape.heads, dtype=np.float32) for ends in ((-5, 90), (0, 0.5)))
    check(ragged(shape, spec, DECODE, [], decode_only=True), spec, kept)
    check(ragged(shape, spec, *MIXED), spec, kept, sinks=sinks)
    check(ragged(shape, spec, *DRAFTS), spec, kept, slopes=slopes)


@pytest.mark.slow
def test_matches_float64_on_random_rows():
    rng, spec = np.random.default_rng(0), AttentionSpec(0.3, window=70, soft_cap=0.8)
    sinks = rng.standard_normal(SMALL.heads).astype(np.float32)
    for seed in range(4):
        count = rng.integers(1, SMALL.rows + 1)
        decode = rng.integers(-1, 190, rng.integers(0, count + 1)).tolist()
        lengths = rng.multinomial(SMALL.tokens - 4, np.ones(5) / 5)[: count - len(decode)] + 1
        prefill = [(int(rng.integers(0, 192 - n)), int(n)) for n in lengths]
        kept = (None, np.dtype(np.int8))[seed % 2]
        check(ragged(SMALL, spec, decode, prefill, seed=seed), spec, kept, sinks)
        decode = rng.integers(-1, 191, SMALL.rows).tolist()
        check(ragged(SMALL, spec, decode, [], seed=seed, decode_only=True), spec, kept, sinks)


@pytest.mark.slow
def test_nobody_is_there():
    spec = AttentionSpec(0.25)
    check(ragged(SMALL, spec, [], []), spec)
    check(ragged(SMALL, spec, [-1] * 4, [], decode_only=True), spec)


@pytest.mark.slow
@pytest.mark.parametrize("decode_only", [True, False])
def test_a_row_that_has_stopped(decode_only):
    """It writes nothing, and none of its pages is read."""
    spec = AttentionSpec(0.25)
    case = ragged(SMALL, spec, [40, 15, 150], [] if decode_only else [(0, 30)], decode_only=decode_only)
    lengths = case.batch.kv_lens.copy()
    lengths[1] = 0
    after = HeadMajorPages(*map(np.array, case.after))
    page = case.batch.pages[1, 0]
    for pool, before in zip(after, case.cache, strict=True):
        pool[page] = before[page]
    check(case._replace(batch=dataclasses.replace(case.batch, kv_lens=lengths), after=after), spec)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["query", "key", "value"])
@pytest.mark.parametrize("decode_only", [True, False])
def test_a_row_that_overflows_harms_no_other(decode_only, part):
    def run(q, k, v, cache, batch, spec):
        return kernel(q, k, v, packed(cache), batch, spec)

    check_overflow(run, PAGED, decode_only, part)


@pytest.mark.slow
def test_a_layer_that_only_reads():
    spec = AttentionSpec(0.25)
    case = ragged(SMALL, spec, *MIXED)
    reads = dataclasses.replace(spec, writes=False)
    check(case._replace(cache=HeadMajorPages(*map(jnp.asarray, case.after)), k=case.k * jnp.nan), reads)


def test_races_are_found(capsys):
    """What begins to copy something must wait for it before it reads it."""

    def copy(x, out, buffer, semaphore):
        begun = pltpu.make_async_copy(x, buffer, semaphore)
        begun.start()
        buffer[...] = jnp.zeros(buffer.shape, buffer.dtype)
        begun.wait()
        out[...] = buffer[...]

    INTERPRETED(
        copy,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        scratch_shapes=[pltpu.VMEM((8, 128), jnp.float32), pltpu.SemaphoreType.DMA],
    )(jnp.ones((8, 128))).block_until_ready()
    assert "RACE DETECTED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype", "name", "nbytes"),
    [
        (12, 64, "bfloat16", "auto", 12 * 2 * 64 * 2),  # GPT-2, nothing of it padded
        (12, 64, "bfloat16", "int8", 12 * 2 * (64 + 4)),
        (8, 128, "bfloat16", "int8", 8 * 2 * (128 + 4)),
        (8, 128, "bfloat16", "fp8", 8 * 2 * (128 + 4)),
        (32, 96, "bfloat16", "auto", 32 * 2 * 96 * 2),
        (3, 96, "bfloat16", "auto", 640 * 2),  # up to a whole column
        (1, 192, "float32", "auto", 2 * 192 * 4),
        (4, 256, "float32", "auto", 4 * 2 * 256 * 4),
    ],
)
def test_bytes(heads, head_dim, dtype, name, nbytes):
    layout = LayerLayout.of(FullAttentionSpec(heads, head_dim), dtype, FakeDevice("tpu"), "paged", name)
    assert layout.backend is PAGED
    assert layout.bytes_per_token == nbytes
    assert layout.kept_heads == (heads, head_dim)


def test_pages_of_other_sizes_are_refused():
    layout = LayerLayout.of(FullAttentionSpec(8, 128), "bfloat16", FakeDevice("tpu"), "paged")
    for size in (4, 24, 96):
        with pytest.raises(ValueError, match=f"page_size is {size}: the kernel for TPUs takes powers of 2 from 8 on"):
            layout.arrays(5, size)


@pytest.mark.parametrize(
    ("attention", "sinks", "dtype", "name", "expected"),
    [
        ("paged", False, "bfloat16", "auto", PAGED),
        ("jax", False, "bfloat16", "auto", TPU),
        ("auto", True, "bfloat16", "auto", PAGED),
        ("auto", False, "bfloat16", "int8", PAGED),
        ("auto", False, "float16", "auto", XLA_ON_TPU),
        ("jax", True, "bfloat16", "auto", "attention is 'jax': JAX's and tokamax's kernels know no attention sinks"),
        ("paged", False, "float16", "auto", "attention is 'paged': .* and dtype is float16; leave it out"),
        ("tokamax", True, "bfloat16", "auto", "attention is 'tokamax': JAX's and tokamax's kernels know no"),
    ],
)
def test_what_is_asked_for_is_taken_or_refused(attention, sinks, dtype, name, expected):
    spec, device = FullAttentionSpec(8, 128, sinks=sinks), FakeDevice("tpu")
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            LayerLayout.of(spec, dtype, device, attention, name)
    else:
        assert LayerLayout.of(spec, dtype, device, attention, name).backend is expected
