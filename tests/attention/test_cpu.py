"""The kernel that reads pages in place on CPUs, against XLA's attention."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxinfer.attention import AttentionSpec, LayerLayout, attend
from jaxinfer.attention.cpu import CPU
from jaxinfer.attention.xla import XLA
from jaxinfer.cache import FullAttentionSpec, HeadMajorPages, QuantizedPages
from jaxinfer.kernels import cpu
from tests.attention.reference import Shape, live, ragged
from tests.attention.test_quantized_cache import rounded
from tests.kernels.test_cpu import needs_them, set_level  # noqa: F401

SHAPES = [
    Shape(head_dim=16, page_size=1),
    Shape(head_dim=80, heads=14, kv_heads=2),
    Shape(heads=5, kv_heads=1, head_dim=64),
]


@needs_them
@pytest.mark.parametrize(
    ("shape", "cache"),
    [
        pytest.param(shape, cache, marks=[] if i == j else [pytest.mark.slow])
        for i, shape in enumerate(SHAPES)
        for j, cache in enumerate(["float32", "bfloat16", "int8"])
    ],
)
def test_as_by_xla(shape, cache, set_level):  # noqa: F811
    kinds = ((None, 1.5), (20, None)) if cache == "bfloat16" else ((None, None), (20, 0.3))
    for decode, prefill in (([0, 15, 16, -1, 699, 127], []), ([3, 300], [(100, 28), (0, 3), (530, 200)])):
        for window, cap in kinds:
            spec = AttentionSpec(shape.head_dim**-0.5, window=window, soft_cap=cap)
            case = ragged(shape, spec, decode, prefill, decode_only=not prefill)
            sinks = None if cap else np.linspace(-3, 5, shape.heads).astype(np.float32)
            pools = HeadMajorPages(*case.cache)
            if cache == "bfloat16":
                pools = HeadMajorPages(*(np.asarray(pool, cache).view(np.uint16) for pool in pools))
            if cache == "int8":
                (k, k_scales), (v, v_scales) = (rounded(pool, "int8") for pool in pools)
                pools = QuantizedPages(k, v, k_scales, v_scales)
            arguments = case.q, case.k, case.v, pools, case.batch
            by_xla = jax.jit(lambda *a, spec=spec, sinks=sinks: attend(*a, spec, sinks)[0])
            assert cpu.ATTEND not in by_xla.lower(*arguments).as_text()
            expected = np.asarray(by_xla(*arguments))
            arguments = *arguments[:-1], dataclasses.replace(case.batch, backend=CPU)
            by_kernel = jax.jit(lambda *a, spec=spec, sinks=sinks: attend(*a, spec, sinks)[0])
            assert cpu.ATTEND in by_kernel.lower(*arguments).as_text()
            used = live(case.batch)
            for level in cpu.LEVELS[: cpu.LEVELS.index(cpu.kernels().level) + 1]:
                set_level(level)
                got = np.asarray(by_kernel(*arguments))
                np.testing.assert_allclose(got[used], expected[used], atol=3e-6)


@needs_them
@pytest.mark.parametrize("window", [None, 20])
def test_sinks(window, set_level):  # noqa: F811
    """Against float64, from less than any score to more by far."""
    shape, sinks = Shape(heads=4, kv_heads=2), np.array([-40.0, 0.7, 3.0, 200.0], np.float32)
    for cap in (None, 2.0):
        spec = AttentionSpec(shape.head_dim**-0.5, window=window, soft_cap=cap)
        for decode, prefill in (([0, 15, -1, 699], []), ([3, 300], [(100, 28), (530, 200)])):
            case = ragged(shape, spec, decode, prefill, decode_only=not prefill, backend=CPU, sinks=sinks)
            call = jax.jit(lambda *a, spec=spec: attend(*a[:-1], spec, a[-1])[0])
            for level in cpu.LEVELS[: cpu.LEVELS.index(cpu.kernels().level) + 1]:
                set_level(level)
                out = np.asarray(call(case.q, case.k, case.v, case.cache, case.batch, sinks))
                np.testing.assert_allclose(out[live(case.batch)], case.out[live(case.batch)], atol=3e-6)


@needs_them
@pytest.mark.parametrize(
    ("attention", "head_dim", "queries", "dtype", "kept", "expected"),
    [
        ("auto", 64, 4, "float32", "auto", CPU),
        ("xla", 64, 4, "float32", "auto", CPU),  # no Pallas, and no more than that
        ("auto", 64, 4, "float32", "int8", CPU),
        ("auto", 64, 4, "float32", "bfloat16", CPU),
        (
            "auto",
            64,
            4,
            "float32",
            "fp8",
            "in float32, bfloat16, int8, and this is kept as float8_e4m3fn",
        ),
        ("auto", 64, 129, "float32", "auto", "at most 128 query heads a key head, and the model has 129"),
        ("auto", 24, 4, "float32", "auto", "multiples of 16, and the model has 24"),
        ("auto", 64, 4, "bfloat16", "auto", "activations in float32, and these are in bfloat16"),
    ],
)
def test_where_it_is_used(attention, head_dim, queries, dtype, kept, expected):
    spec = FullAttentionSpec(2, head_dim, queries=queries)
    layout = LayerLayout.of(spec, dtype, jax.devices()[0], attention, kept)
    if isinstance(expected, str):
        assert layout.backend is XLA
        assert expected in CPU.supports(layout.case)
    else:
        assert layout.backend is expected
