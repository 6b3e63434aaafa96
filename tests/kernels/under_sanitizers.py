"""Calls the kernels of a library that was built with sanitizers, which watch the ends of arrays."""

import ctypes
import itertools
import sys

import jax
import numpy as np

from jaxinfer.kernels import cpu
from tests.kernels.test_cpu import PAIRS, SIZES, random

library = ctypes.CDLL(sys.argv[1])
jax.ffi.register_ffi_target("sanitized", jax.ffi.pycapsule(library.jaxinfer_dot), platform="cpu")
for activations, weights in PAIRS:
    kind = np.int32 if activations == "int8" else np.float32
    for tokens, depth, columns in SIZES:
        x, w = random((tokens, depth), activations), random((columns, depth), weights)
        call = jax.ffi.ffi_call("sanitized", jax.ShapeDtypeStruct((tokens, columns), kind))
        for level, rounds in itertools.product(range(len(cpu.LEVELS)), (False, True)):
            library.jaxinfer_level(level)
            jax.block_until_ready(call(x, w, rounds=rounds))
print(f"{len(SIZES) * len(PAIRS)} products at each level")
