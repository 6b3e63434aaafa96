"""The kernel that reads pages in place on CPUs, against XLA's attention."""

import jax
import numpy as np
import pytest

from jaxinfer.attention import AttentionSpec, attend
from jaxinfer.cache import QuantizedPages, SplitPages
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
def test_as_by_xla(shape, cache, set_level, monkeypatch):  # noqa: F811
    for decode, prefill in (([0, 15, 16, -1, 699, 127], []), ([3, 300], [(100, 28), (0, 3), (530, 200)])):
        for window in (None, 20):
            spec = AttentionSpec(shape.head_dim**-0.5, window=window)
            case = ragged(shape, spec, decode, prefill, decode_only=not prefill)
            pools = SplitPages(*(np.asarray(pool, cache if cache != "int8" else None) for pool in case.cache))
            if cache == "int8":
                (k, k_scales), (v, v_scales) = (rounded(pool, "int8") for pool in pools)
                pools = QuantizedPages(k, v, k_scales, v_scales)
            arguments = case.q, case.k, case.v, pools, case.batch
            with monkeypatch.context() as patch:
                patch.setattr(cpu, "CACHES", ())
                by_xla = jax.jit(lambda *a, spec=spec: attend(*a, spec)[0])
                assert cpu.ATTEND not in by_xla.lower(*arguments).as_text()
                expected = np.asarray(by_xla(*arguments))
            by_kernel = jax.jit(lambda *a, spec=spec: attend(*a, spec)[0])
            assert cpu.ATTEND in by_kernel.lower(*arguments).as_text()
            used = live(case.batch)
            for level in cpu.LEVELS[: cpu.LEVELS.index(cpu.kernels().level) + 1]:
                set_level(level)
                got = np.asarray(by_kernel(*arguments))
                # XLA rounds weights to bfloat16 where values are.
                np.testing.assert_allclose(got[used], expected[used], atol=1e-2 if cache == "bfloat16" else 3e-6)
