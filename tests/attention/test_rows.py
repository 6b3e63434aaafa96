"""Attention within rows of the stream against float64, by plain XLA and by the kernel for CPUs."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.attention import AttentionSpec, ForwardBatch, attend
from jaxinfer.attention.relative import Relative, alibi, deberta_buckets, distances, t5_buckets
from jaxinfer.attention.rows import as_one, attend_rows, by_tiles
from jaxinfer.kernels import cpu
from jaxinfer.sharding import make_mesh
from tests.attention.reference import attend_row
from tests.kernels.test_cpu import needs_them, set_level  # noqa: F401

LENGTHS = [0, 1, 2, 63, 0, 64, 65, 129, 33]
TOKENS = 384  # the rest is padding


class Case(NamedTuple):
    heads: int
    kv_heads: int
    head_dim: int
    spec: AttentionSpec
    sinks: bool = False
    bias: int = 0  # how many distances it has, in each direction
    products: bool = False
    dtype: str = "float32"


BOTH = AttentionSpec(0.3, causal=False)
CASES = {
    "both directions": Case(4, 2, 8, BOTH),
    "bfloat16": Case(4, 2, 16, BOTH, dtype="bfloat16"),
    "window as ModernBERT's, 64 on each side": Case(2, 2, 64, AttentionSpec(0.1, causal=False, window=65)),
    "causal window, soft cap, sinks": Case(3, 1, 24, AttentionSpec(0.3, window=20, soft_cap=0.8), sinks=True),
    "bias": Case(4, 4, 16, AttentionSpec(0.3, causal=False), bias=70),
    "causal, bias, heads of 128": Case(6, 2, 128, AttentionSpec(0.1), sinks=True, bias=200),
}
BY_XLA = {
    "chunk": Case(2, 1, 8, AttentionSpec(0.3, chunk=48)),
    "disentangled": Case(4, 2, 16, AttentionSpec(0.2, causal=False), bias=30, products=True),
}


def case_of(case, lengths, tokens, seed=0):
    """What goes in, and what should come out."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), case.dtype)

    q = normal(tokens, case.heads, case.head_dim)
    k, v = (normal(tokens, case.kv_heads, case.head_dim) for _ in range(2))
    batch = ForwardBatch.of_sequences([[0] * n for n in lengths], tokens)
    sinks = np.linspace(-3, 5, case.heads).astype(np.float32) if case.sinks else None
    relative = None
    if case.bias:
        relative = Relative(rng.standard_normal((case.heads, 2 * case.bias - 1)).astype(np.float32))
    if case.products:
        relative = relative._replace(
            keys=normal(case.heads, 2 * 50 - 1, case.head_dim), queries=normal(case.heads, 2 * 80 - 1, case.head_dim)
        )
    out = np.zeros(q.shape)
    for start, length in zip(np.cumsum([0, *lengths]), lengths, strict=False):
        row = slice(start, start + length)
        out[row] = attend_row(*(x[row] for x in (q, k, v)), case.spec, sinks, relative)
    return (q, k, v, batch, sinks, relative), out


def by_kernel(q, k, v, batch, sinks, relative, spec):
    return attend_rows(q, k, v, batch, spec, sinks, relative)


WAYS = [pytest.param(by_tiles, id="XLA"), pytest.param(by_kernel, id="kernel", marks=needs_them)]


def program(way, spec):
    return jax.jit(functools.partial(way, spec=spec))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [*CASES, *BY_XLA])
def test_matches_float64(name, way):
    if name in BY_XLA and way is by_kernel:
        pytest.skip("the kernel is not for it")
    case = CASES[name] if name in CASES else BY_XLA[name]
    call = program(way, case.spec)
    for seed, lengths in enumerate((LENGTHS, [TOKENS], [1] * 200)):
        given, out = case_of(case, lengths + [0] * (200 - len(lengths)), TOKENS, seed)
        if way is by_kernel and not seed:
            assert cpu.ATTEND_ROWS in call.lower(*given).as_text()
        got = np.asarray(call(*given), np.float64)
        np.testing.assert_allclose(got, out, atol=3e-2 if case.dtype == "bfloat16" else 3e-6)
        if case.dtype == "float32" and not seed:
            by_definition = np.asarray(as_one(*given, spec=case.spec))[: sum(lengths)]
            np.testing.assert_allclose(by_definition, out[: sum(lengths)], atol=3e-6)


@needs_them
def test_every_level_on_random_rows(set_level):  # noqa: F811
    rng = np.random.default_rng(0)
    for name, case in CASES.items():
        call = program(by_kernel, case.spec)
        for level in cpu.LEVELS[: cpu.LEVELS.index(cpu.kernels().level) + 1]:
            set_level(level)
            lengths = rng.multinomial(rng.integers(0, 201), np.ones(7) / 7).tolist()
            given, out = case_of(case, lengths, 200, seed=int(rng.integers(100)))
            error = np.abs(np.asarray(call(*given), np.float64) - out).max()
            assert error < (3e-2 if case.dtype == "bfloat16" else 3e-6), (name, level, lengths)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["both directions", "causal, bias, heads of 128"])
def test_a_row_does_not_depend_on_its_company(name, way):
    """To the bit; whatever is in other rows and in the padding."""
    case = CASES[name]
    call = program(way, case.spec)
    (*streams, batch, sinks, relative), _ = case_of(case, LENGTHS, TOKENS)
    whole = np.asarray(call(*streams, batch, sinks, relative))
    for start, length in zip(np.cumsum([0, *LENGTHS]), LENGTHS, strict=False):
        row = slice(start, start + length)
        others = np.ones(TOKENS, bool)
        others[row] = False
        filled = [jnp.where(others[:, None, None], jnp.nan, x) for x in streams]
        np.testing.assert_array_equal(np.asarray(call(*filled, batch, sinks, relative))[row], whole[row])
        padding = [(0, (64 if length <= 64 else TOKENS) - length), (0, 0), (0, 0)]
        alone = [jnp.pad(x[row], padding, constant_values=jnp.nan) for x in streams]
        of_it = ForwardBatch.of_sequences([[0] * length], len(alone[0]))
        np.testing.assert_array_equal(np.asarray(call(*alone, of_it, sinks, relative))[:length], whole[row])


def test_derivatives():
    """Along a direction, against differences; those of the definition are for streams of any rows."""
    case = CASES["bias"]
    (q, k, v, batch, sinks, relative), _ = case_of(case, [20, 0, 33], 64)

    def total(scale):
        moved = relative._replace(bias=relative.bias * scale)
        return jnp.sum(jnp.sin(attend_rows(q * scale, k, v * scale, batch, case.spec, sinks, moved)))

    slope = jax.jit(jax.grad(total))(1.0)
    assert float(slope) == pytest.approx(float(total(1.01) - total(0.99)) / 0.02, rel=1e-2)


def test_on_a_mesh():
    """Each device has its own heads, of what is given for heads, too."""
    case = CASES["causal, bias, heads of 128"]._replace(heads=8, kv_heads=2)
    (q, k, v, batch, sinks, relative), out = case_of(case, LENGTHS, TOKENS)
    mesh = make_mesh("tensor=4", jax.devices(), 8, 2, 64)
    with jax.set_mesh(mesh):
        call = jax.jit(lambda *given: attend(*given[:3], None, given[3], case.spec, *given[4:])[0])
        got = call(q, k, v, dataclasses.replace(batch, mesh=mesh), sinks, relative)
    np.testing.assert_allclose(np.asarray(got), out, atol=3e-6)


def test_scores_by_distance_need_rows_without_a_cache():
    batch = ForwardBatch.of_sequences([[1, 2]])
    x = jnp.ones((2, 1, 8))
    with pytest.raises(ValueError, match="pass cache=None"):
        attend(x, x, x, (), batch, AttentionSpec(1.0), relative=Relative(jnp.ones((1, 3))))


def test_buckets_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position
    from transformers.models.t5.modeling_t5 import T5Attention

    away = distances(700)
    for buckets, furthest in ((32, 128), (16, 64), (8, 20)):
        for causal in (False, True):
            expected = T5Attention._relative_position_bucket(torch.tensor(away), not causal, buckets, furthest)
            np.testing.assert_array_equal(t5_buckets(away, buckets, furthest, causal), expected.numpy())
    for buckets, furthest in ((256, 512), (8, 40)):
        expected = make_log_bucket_position(torch.tensor(-away), buckets, furthest).numpy() + buckets
        np.testing.assert_array_equal(deberta_buckets(away, buckets, furthest), np.clip(expected, 0, 2 * buckets - 1))
    np.testing.assert_array_equal(deberta_buckets(np.array([-9, -2, 0, 3, 9]), 0, 5), [9, 7, 5, 2, 0])


def test_alibi():
    np.testing.assert_array_equal(alibi([1.0, 0.5], 3).bias, [[-2, -1, 0, -1, -2], [-1, -0.5, 0, -0.5, -1]])
