"""Products by experts: by the CPU kernels, at each level that this machine has, and by XLA alone, against float64."""

import ctypes
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import LLM, SamplingParams
from jaxinfer.kernels import cpu
from jaxinfer.quantization.quantize import quantize
from jaxinfer.quantization.schemes import SCHEMES
from jaxinfer.weights import Dense, QArray, grouped_dots
from jaxinfer.weights.weight import by_tiles
from tests.kernels.test_cpu import LIBRARY, needs_them, set_level  # noqa: F401  (a fixture)
from tests.models.test_families import reference as checkpoint_of

RNG = np.random.default_rng(0)
# Rows of each expert; the rest is nobody's.
SIZES = [
    (1, 1, 1, 1, 0, 0),
    (0, 0, 3, 0, 0, 2),
    (0,) * 6,
    (40, 0, 7, 9, 1, 0),
    (130, 3, 0, 20, 0, 7),
    (0, 0, 0, 200, 0, 0),
]
ROWS = 200
KINDS = [None, *SCHEMES]
BY_LOOP = ("fp8-block",)
reference = jax.jit(by_tiles)


def case(sizes, kind, dtype, columns=256, outs=(40, 24)):
    """Rows, how many each expert has, and weights; and what is right."""
    x = RNG.normal(size=(ROWS, columns)).astype(jnp.dtype(dtype))
    x[sum(sizes) :] = np.nan  # what is nobody's matters to nobody
    weights, right = [], []
    for out in outs:
        made = RNG.normal(size=(len(sizes), out, columns)).astype(np.float32)
        if kind is None:
            array = jnp.asarray(made, dtype)
            weights.append(Dense(array))
            full = np.asarray(array, np.float64)
        else:
            weight = QArray(*map(jnp.asarray, quantize(made, SCHEMES[kind])), SCHEMES[kind])
            full = np.stack(
                [np.asarray(weight[i].take(jnp.arange(out), "float32"), np.float64) for i in range(len(sizes))]
            )
            weights.append(weight)
        owner = np.repeat(np.arange(len(sizes)), sizes)
        own = np.einsum("mk,mnk->mn", np.asarray(x[: len(owner)], np.float64), full[owner])
        right.append(np.concatenate([own, np.zeros((ROWS - len(owner), out))]))
    return jnp.asarray(x), jnp.asarray(sizes, jnp.int32), weights, right


def check(outs, right, bound):
    for out, expected in zip(outs, right, strict=True):
        assert out.dtype == jnp.float32
        assert np.abs(np.asarray(out) - expected).max() <= bound * max(np.abs(expected).max(), 1)


def bound_of(kind, dtype):
    if kind and SCHEMES[kind].activations:
        return 2e-2
    return 1e-2 if dtype == "bfloat16" and kind and SCHEMES[kind].columns else 2e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_products(kind, dtype):
    call = jax.jit(functools.partial(grouped_dots, out_dtype="float32"))
    if LIBRARY is not None:
        text = call.lower(*case(SIZES[0], kind, dtype)[:3]).as_text()
        assert (cpu.GROUPED in text) == (kind not in BY_LOOP)
    for sizes in SIZES:
        x, counts, weights, right = case(sizes, kind, dtype)
        check(call(x, counts, weights), right, bound_of(kind, dtype))
        check(reference(x, counts, weights), right, bound_of(kind, dtype))


@needs_them
@pytest.mark.parametrize("kind", [None, "int8", "int4", "int8-w8a8", "nf4", "mxfp4"])
def test_every_level(kind, set_level):  # noqa: F811
    call = jax.jit(functools.partial(grouped_dots, out_dtype="float32"))
    for sizes in SIZES:
        x, counts, weights, right = case(sizes, kind, "float32")
        for level in cpu.LEVELS[: cpu.LEVELS.index(cpu.kernels().level) + 1]:
            set_level(level)
            check(call(x, counts, weights), right, 1e-2 if level == "avx512" else bound_of(kind, "float32"))


def experts_read():
    """Bytes, so far."""
    count = ctypes.CDLL(os.fspath(LIBRARY)).jaxinfer_experts_read
    count.restype = ctypes.c_int64
    return count()


@needs_them
@pytest.mark.parametrize(("kind", "bits"), [(None, 32), ("int8", 8), ("int4", 4), ("mxfp4", 4), ("int8-w8a8", 8)])
def test_experts_without_rows_are_not_read(kind, bits):
    call = jax.jit(functools.partial(grouped_dots, out_dtype="float32"))
    for sizes in SIZES:
        x, counts, weights, _ = case(sizes, kind, "float32")
        before = experts_read()
        jax.block_until_ready(call(x, counts, weights))
        hit = sum(size > 0 for size in sizes)
        assert experts_read() - before == hit * sum(weight.shape[1] * weight.shape[2] for weight in weights) * bits // 8


@needs_them
def test_experts_of_padding_are_not_read():
    """Whose activations are zeros."""
    call = jax.jit(functools.partial(grouped_dots, out_dtype="float32"))
    x, counts, weights, _ = case(SIZES[0], None, "float32")
    owners = np.repeat(np.arange(len(counts)), counts)
    dropped = owners == owners[-1]
    before = experts_read()
    found = jax.block_until_ready(call(jnp.where(dropped[:, None], 0, x[: len(owners)]), counts, weights))
    hit = len(set(owners.tolist())) - 1
    assert experts_read() - before == hit * sum(weight.shape[1] * weight.shape[2] for weight in weights) * 4
    assert not any(np.asarray(out)[dropped].any() for out in found)
    assert all(np.asarray(out)[~dropped].any() for out in found)


@needs_them
def test_a_decode_step_reads_the_experts_of_its_token(checkpoints):
    found = checkpoint_of(checkpoints.root, "qwen3_moe", "large")
    with LLM(found.folder, dtype="bfloat16", max_num_seqs=4, enable_prefix_caching=False) as llm:

        def read(new_tokens):
            before = experts_read()
            params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
            llm.generate([{"prompt_token_ids": found.tokens[:20]}], params, use_tqdm=False)
            return experts_read() - before

        stacked = [a for name, a in llm.model.abstract.items() if ".experts." in name]
        all_of_them = sum(a.size * a.dtype.itemsize for a in stacked)
        experts, chosen = 8, 3
        assert read(7) - read(2) == 5 * all_of_them * chosen // experts
