"""Products by experts on TPUs: the kernels of our own in JAX's interpreter of them, against float64 numpy. Races are
found, and memory that nobody wrote is NaN."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxinfer.kernels.tpu import experts, grouped
from jaxinfer.kernels.tpu.grouped import grouped_product, whole_part
from jaxinfer.quantization.quantize import quantize
from jaxinfer.quantization.schemes import SCHEMES, Scheme
from jaxinfer.weights import Dense, QArray
from jaxinfer.weights.weight import Weight

EXPERTS, FEATURES, HIDDEN = 6, 256, 512

RNG = np.random.default_rng(0)
INTERPRETED = functools.partial(pl.pallas_call, interpret=pltpu.InterpretParams(detect_races=True))
# Rows in all, and of each expert; the rest is nobody's.
SIZES = [(40, (3, 0, 5, 1)), (300, (130, 0, 7, 163)), (300, (0, 1, 127, 2)), (200, (0, 200, 0, 0)), (7, (0, 0, 0, 0))]
# Those that only checkpoints have, too.
STORED = [
    Scheme("awq", "uint8", 7.0, columns=128, packed=2, zeros=True),
    Scheme("affine", "uint8", 7.0, columns=64, packed=2, biases=True),
]
KINDS = {"none": None, **SCHEMES, **{scheme.name: scheme for scheme in STORED}}


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch, capsys):
    monkeypatch.setattr(pl, "pallas_call", INTERPRETED)
    yield
    assert "RACE" not in capsys.readouterr().out


def weight_of(kind: str, dtype: str, *sizes: int) -> tuple[Weight, np.ndarray]:
    """Random; and what it stands for, in float64."""
    made, scheme = RNG.normal(size=sizes).astype(np.float32), KINDS[kind]
    if scheme is None:
        array = jnp.asarray(made, dtype)
        return Dense(array), np.asarray(array, np.float64)
    arrays = dict(zip(("qvalue", "scale"), quantize(made, scheme), strict=False))
    shape = arrays["scale"].shape
    if scheme.zeros:
        arrays["zero_point"] = RNG.integers(-8, 8, shape).astype(np.int8)
    if scheme.biases:
        arrays["bias"] = RNG.normal(size=shape).astype(np.float32)
    weight = QArray(scheme=scheme, **{name: jnp.asarray(array) for name, array in arrays.items()})
    ids = jnp.arange(sizes[1])
    return weight, np.stack([np.asarray(weight[i].take(ids, "float32"), np.float64) for i in range(sizes[0])])


def bound_of(kind: str, dtype: str) -> float:
    scheme = KINDS[kind]
    if scheme and scheme.activations:
        return 2e-2
    return 1e-2 if dtype == "bfloat16" and scheme and scheme.columns else 1e-5


def check(found, expected, bound):
    assert found.dtype == jnp.float32
    assert np.abs(np.asarray(found) - expected).max() <= bound * max(np.abs(expected).max(), 1)


def case(rows, sizes, kind, dtype, outs, ins):
    x = RNG.normal(size=(rows, ins)).astype(jnp.dtype(dtype))
    x[sum(sizes) :] = np.nan  # what is nobody's matters to nobody
    weight, full = weight_of(kind, dtype, len(sizes), outs, ins)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    own = np.einsum("mk,mnk->mn", np.asarray(x[: len(owner)], np.float64), full[owner])
    expected = np.concatenate([own, np.zeros((rows - len(owner), outs))])
    assert weight.kept.suits(x.dtype)
    return jnp.asarray(x), jnp.asarray(sizes, jnp.int32), weight.kept, expected


@pytest.mark.parametrize(("rows", "sizes"), SIZES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_by_expert(rows, sizes, dtype, monkeypatch):
    """Outputs in several blocks."""
    monkeypatch.setattr(grouped, "WEIGHT_BYTES", 256 * 256 * 4)
    *given, expected = case(rows, sizes, "none", dtype, 640, 256)
    check(jax.jit(grouped_product)(*given), expected, bound_of("none", dtype))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "none"])
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_every_scheme(kind, dtype):
    *given, expected = case(300, (130, 0, 7, 160), kind, dtype, 256, 512)
    check(jax.jit(grouped_product)(*given), expected, bound_of(kind, dtype))


def swiglu(gate, up):
    return jax.nn.silu(gate) * up


def mixed(kind, dtype, chosen, of_inputs=False, biased=False, in_tile=32, cut=None):
    """What the kernel makes of random tokens, and what is right."""
    tokens = len(chosen)
    x = jnp.asarray(RNG.normal(size=(tokens, FEATURES)), dtype)
    shares = RNG.uniform(0.1, 1, size=chosen.shape).astype(np.float32)
    shapes = (HIDDEN, FEATURES), (HIDDEN, FEATURES), (FEATURES, HIDDEN)
    weights, full = zip(*(weight_of(kind, dtype, EXPERTS, *shape) for shape in shapes), strict=True)
    biases = [jnp.asarray(RNG.normal(size=(EXPERTS, outs)), dtype) for outs, _ in shapes if biased]
    kept = tuple(weight.kept for weight in weights)
    blocks = experts.blocks_of(tokens, x.dtype, kept[:-1], kept[-1])
    blocks = blocks if cut is None else blocks._replace(hidden=cut)

    def run(x, chosen, shares, kept, biases):
        rows = experts.by_expert(chosen, shares, EXPERTS)
        return experts.mixture(x, rows, kept, biases, swiglu, of_inputs, blocks, in_tile)

    found = jax.jit(run)(x, jnp.asarray(chosen), jnp.asarray(shares), kept, tuple(biases))
    expected = np.zeros((tokens, FEATURES))
    more = [np.asarray(bias, np.float64) for bias in biases] or [np.zeros((EXPERTS, 1))] * 3
    for t, k in np.argwhere((chosen >= 0) & (chosen < EXPERTS)):
        e, share = chosen[t, k], float(shares[t, k])
        own = np.asarray(x[t], np.float64) * (share if of_inputs else 1)
        gate, up = (full[n][e] @ own + more[n][e] for n in (0, 1))
        expected[t] += (full[2][e] @ (gate / (1 + np.exp(-gate)) * up) + more[2][e]) * (1 if of_inputs else share)
    return found, expected


def some_experts(tokens, among=EXPERTS + 4, top_k=3):
    """Of each token, none twice; some are on other devices."""
    return np.stack([RNG.permutation(among)[:top_k] for _ in range(tokens)]).astype(np.int32) - 2


@pytest.mark.parametrize("kind", ["none", "int8", "int8-w8a8", "int4", "mxfp4", "fp8-block"])
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_mixture(kind, dtype):
    found, expected = mixed(kind, dtype, some_experts(40))
    check(found, expected, 3e-2 if KINDS[kind] and KINDS[kind].activations else 2e-5 if dtype == "float32" else 1e-2)


@pytest.mark.parametrize("case", ["biases", "cut", "one", "nobody", "one token"])
def test_mixtures(case):
    """An expert without rows; several tiles of one expert's, several blocks of hidden numbers; tokens of nobody."""
    chosen = {"one": np.full((70, 1), 2), "nobody": np.full((9, 2), -1)}.get(case)
    chosen = some_experts(1 if case == "one token" else 40) if chosen is None else chosen.astype(np.int32)
    chosen[chosen == 3] = -1
    is_biased = case == "biases"
    found, expected = mixed(
        "none", "float32", chosen, is_biased, is_biased, cut=256 if case in ("biases", "cut") else None
    )
    check(found, expected, 2e-5)
    assert found.any() == (case != "nobody")


def test_tokens_come_in_blocks_where_fast_memory_is_short(monkeypatch):
    kept = [Dense(jax.ShapeDtypeStruct(shape, "bfloat16")).kept for shape in [(16, 768, 2048)] * 2 + [(16, 2048, 768)]]
    whole = experts.blocks_of(2048, jnp.dtype("bfloat16"), tuple(kept[:2]), kept[2])
    assert whole.tokens == 2048
    assert whole.bytes <= experts.MEMORY
    monkeypatch.setattr(experts, "MEMORY", 32 * 2**20)
    assert experts.blocks_of(2048, jnp.dtype("bfloat16"), tuple(kept[:2]), kept[2]).tokens == 1024
    monkeypatch.setattr(experts, "MEMORY", 4 * 2**20)
    assert experts.blocks_of(2048, jnp.dtype("bfloat16"), tuple(kept[:2]), kept[2]) is None


@pytest.mark.parametrize(("size", "most", "part"), [(640, 256, 128), (768, 400, 384), (768, 768, 768), (2048, 1, 128)])
def test_blocks_divide_outputs(size, most, part):
    assert whole_part(size, most) == part


def test_what_it_is_not_for():
    weight = Dense(jnp.zeros((2, 128, 128), "bfloat16")).kept
    assert weight.suits(jnp.dtype("bfloat16"))
    assert not weight.suits(jnp.dtype("float32"))
    assert not Dense(jnp.zeros((2, 128, 128), "float16")).kept.suits(jnp.dtype("float16"))
    assert not Dense(jnp.zeros((2, 128, 64), "bfloat16")).kept.suits(jnp.dtype("bfloat16"))
    packed = quantize(np.ones((2, 128, 128), np.float32), SCHEMES["int4"])
    assert not QArray(*map(jnp.asarray, packed), SCHEMES["int4"]).kept.suits(jnp.dtype("bfloat16"))  # half a tile
