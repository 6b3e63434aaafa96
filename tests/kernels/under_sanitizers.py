"""Calls the kernels of a library that was built with sanitizers, which watch the ends of arrays."""

import ctypes
import itertools
import sys

import jax
import ml_dtypes
import numpy as np

from jaxinfer.kernels import cpu
from jaxinfer.kernels.cpu.attention import CACHES
from tests.kernels.test_cpu import PAIRS, SIZES, random

KINDS = ("float32", "bfloat16")
library = ctypes.CDLL(sys.argv[1])
jax.ffi.register_ffi_target("sanitized", jax.ffi.pycapsule(library.jaxinfer_dot), platform="cpu")
for activations, weights in PAIRS:
    kind = np.int32 if activations == "int8" else np.float32
    for tokens, depth, columns in SIZES:
        x, w = random((tokens, depth), activations), random((columns, depth), weights)
        call = jax.ffi.ffi_call("sanitized", [jax.ShapeDtypeStruct((tokens, columns), kind)])
        for level, rounds in itertools.product(range(len(cpu.LEVELS)), (False, True)):
            library.jaxinfer_level(level)
            jax.block_until_ready(call(x, w, rounds=rounds))
jax.ffi.register_ffi_target("int4", jax.ffi.pycapsule(library.jaxinfer_dot_int4), platform="cpu")
for tokens, level, rounds in itertools.product((1, 7, 9, 33), range(len(cpu.LEVELS)), (False, True)):
    library.jaxinfer_level(level)
    call = jax.ffi.ffi_call("int4", [jax.ShapeDtypeStruct((tokens, 13), np.float32)])
    w = random((13, 96), "int8").view(np.uint8)
    powers = random((13, 6), "int8").view(ml_dtypes.float8_e8m0fnu)
    for table, scales in ((0, random((13, 6), "float32")), (16, powers)):
        options = {"rounds": rounds, "table": random(table, "float32")}
        jax.block_until_ready(call(random((tokens, 192), "float32"), w, scales, **options))
jax.ffi.register_ffi_target("grouped", jax.ffi.pycapsule(library.jaxinfer_grouped_dot), platform="cpu")
jax.ffi.register_ffi_target("grouped_int4", jax.ffi.pycapsule(library.jaxinfer_grouped_dot_int4), platform="cpu")
for sizes, level, rounds in itertools.product(
    ((1, 0, 1), (0, 0, 0), (3, 9, 0), (0, 20, 1), (2, 4, 7)), range(len(cpu.LEVELS)), (False, True)
):
    library.jaxinfer_level(level)
    rows, counts = sum(sizes) + 2, np.array(sizes, np.int32)
    for activations, weights in PAIRS:
        kind = np.int32 if activations == "int8" else np.float32
        call = jax.ffi.ffi_call("grouped", [jax.ShapeDtypeStruct((rows, n), kind) for n in (13, 5)])
        both = [random((3, n, 67), weights) for n in (13, 5)]
        jax.block_until_ready(call(random((rows, 67), activations), counts, *both, rounds=rounds))
    call = jax.ffi.ffi_call("grouped_int4", [jax.ShapeDtypeStruct((rows, 13), np.float32)])
    w, powers = random((3, 13, 96), "int8").view(np.uint8), random((3, 13, 6), "int8").view(ml_dtypes.float8_e8m0fnu)
    for table, scales in ((0, random((3, 13, 6), "float32")), (16, powers)):
        options = {"rounds": rounds, "table": random(table, "float32")}
        jax.block_until_ready(call(random((rows, 192), "float32"), counts, w, scales, **options))
jax.ffi.register_ffi_target("low_rank", jax.ffi.pycapsule(library.jaxinfer_low_rank), platform="cpu")
for tokens, kind, level, more in itertools.product((1, 9, 20), KINDS, range(len(cpu.LEVELS)), (False, True)):
    library.jaxinfer_level(level)
    slot, given = np.arange(-1, tokens - 1, dtype=np.int32) % 6 - 1, []
    for columns in (13, 70):
        given += [random((tokens, columns), "float32"), random((3, 5, 67), kind), random((3, 5, columns), kind)]
        given += [random((3, columns), "float32")] * 2 if more else []
    call = jax.ffi.ffi_call("low_rank", [jax.ShapeDtypeStruct((tokens, n), np.float32) for n in (13, 70)])
    jax.block_until_ready(call(random((tokens, 67), "float32"), slot, *given, share=np.float32(0.5)))
jax.ffi.register_ffi_target("adapted_dot", jax.ffi.pycapsule(library.jaxinfer_adapted_dot), platform="cpu")
for tokens, (kind, values), level in itertools.product(
    (1, 9, 20), (("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "int8")), range(len(cpu.LEVELS))
):
    library.jaxinfer_level(level)
    slot, given, scaled = np.arange(-1, tokens - 1, dtype=np.int32) % 6 - 1, [], values == "int8"
    for columns in (13, 70):
        given += [random((columns, 67), values), *([random(columns, "float32")] if scaled else [])]
        given += [random((3, 5, 67), kind), random((3, 5, columns), kind)]
    call = jax.ffi.ffi_call("adapted_dot", [jax.ShapeDtypeStruct((tokens, n), np.float32) for n in (13, 70)])
    options = {"share": np.float32(0.5), "rounds": True, "scaled": scaled}
    jax.block_until_ready(call(random((tokens, 67), "float32"), slot, *given, **options))
jax.ffi.register_ffi_target("attend", jax.ffi.pycapsule(library.jaxinfer_attention), platform="cpu")
for kind, level in itertools.product(CACHES, range(len(cpu.LEVELS))):
    library.jaxinfer_level(level)
    lengths, cu_q_lens = np.array([7, 0, 10], np.int32), np.array([0, 5, 6, 12], np.int32)
    q, pages = random((12, 2, 5, 48), "float32"), np.array([[0, 1], [1, 0], [2, 2]], np.int32)
    pools = [random((3, 2, 5, 48), kind), random((3, 2, 5, 48), kind)]
    pools = [pool.view(np.uint16) for pool in pools] if kind == "bfloat16" else pools
    pools += [random((3, 2, 5), "float32")] * 2 if kind == "int8" else []
    call = jax.ffi.ffi_call("attend", jax.ShapeDtypeStruct(q.shape, q.dtype))
    for window, cap, one_each, sinks in itertools.product((0, 4), (0, 5), (False, True), (0, 10)):
        options = {"scale": np.float32(0.1), "soft_cap": np.float32(cap), "window": np.int64(window)}
        starts = np.arange(4, dtype=np.int32) if one_each else cu_q_lens
        jax.block_until_ready(call(q, random(sinks, "float32"), starts, lengths, pages, *pools, **options))
jax.ffi.register_ffi_target("argmax", jax.ffi.pycapsule(library.jaxinfer_argmax), platform="cpu")
for size, level in itertools.product(((3, 1), (1, 19), (40, 2777)), range(len(cpu.LEVELS))):
    library.jaxinfer_level(level)
    outs = [jax.ShapeDtypeStruct(size[:1], kind) for kind in (np.float32, np.int32)]
    jax.block_until_ready(jax.ffi.ffi_call("argmax", outs)(random(size, "float32")))
jax.ffi.register_ffi_target("attend_rows", jax.ffi.pycapsule(library.jaxinfer_attention_rows), platform="cpu")
for kind, level, group in itertools.product(("float32", "bfloat16"), range(len(cpu.LEVELS)), (1, 5)):
    library.jaxinfer_level(level)
    starts = np.array([0, 0, 1, 3, 70, 135, 140], np.int32)  # and three tokens of padding
    q, (k, v) = random((143, 2, group, 48), kind), (random((143, 2, 48), kind) for _ in range(2))
    call = jax.ffi.ffi_call("attend_rows", jax.ShapeDtypeStruct(q.shape, q.dtype))
    for window, cap, causal, sinks, bias in itertools.product((0, 4, 999), (0, 5), (False, True), (0, 1), (0, 1, 9)):
        options = {"scale": np.float32(0.1), "soft_cap": np.float32(cap), "window": np.int64(window), "causal": causal}
        distances = random((2 * group, 2 * bias - 1) if bias else 0, "float32")
        jax.block_until_ready(call(q, random(2 * group * sinks, "float32"), distances, starts, k, v, **options))
rows = [np.array(values, np.int32) for values in ((0, 1, 2, 14, 17), (4, 0, 12, 5), (2, 4, 0, 1))]  # and padding
cases = (
    ("linear_attention", [(5, 6, 7, 33), (19, 3, 7), (19, 3, 7), (19, 6, 33), (19, 6), (19, 6)], (19, 6, 33)),
    ("linear_attention", [(5, 2, 5, 3), (19, 1, 5), (19, 1, 5), (19, 2, 3), (19, 2)], (19, 2, 3)),
    ("selective_scan", [(5, 13, 3), (19, 13), (19, 13), (19, 3), (19, 3), (13, 3)], (19, 13)),
    ("convolution", [(5, 3, 85), (19, 85), (85, 4), (85,)], (19, 85)),
    ("convolution", [(5, 0, 6), (19, 6), (6, 1), (0,)], (19, 6)),
)
for (name, shapes, out), level in itertools.product(cases, range(len(cpu.LEVELS))):
    library.jaxinfer_level(level)
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(library[f"jaxinfer_{name}"]), platform="cpu")
    states, *inputs = (-np.abs(random(shape, "float32")) for shape in shapes)
    like = [jax.ShapeDtypeStruct(shape, np.float32) for shape in (states.shape, out)]
    jax.block_until_ready(jax.ffi.ffi_call(name, like)(states, *rows, *inputs))
jax.ffi.register_ffi_target("take", jax.ffi.pycapsule(library.jaxinfer_take), platform="cpu")
call = jax.ffi.ffi_call("take", jax.ShapeDtypeStruct((3, 5), np.float32))
jax.block_until_ready(call(random((4, 5), "float32"), np.array([3, 9, -1], np.int32)))
print(f"{len(SIZES) * len(PAIRS)} products at each level")
