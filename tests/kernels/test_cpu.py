"""The CPU kernels against float64, at each level that this machine has."""

import ctypes
import functools
import importlib.machinery
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxinfer.kernels import cpu
from jaxinfer.quantization.quantize import quantize
from jaxinfer.quantization.schemes import SCHEMES
from jaxinfer.sharding import TENSOR, on_axes
from jaxinfer.weights import Dense, QArray, dot, dots, products, take

FOLDER = Path(cpu.__file__).parent
LIBRARY = next((f for s in importlib.machinery.EXTENSION_SUFFIXES if (f := FOLDER / f"_kernels{s}").exists()), None)
KEPT = ("bfloat16", "int8", "float8_e4m3fn")
PAIRS = [("int8", "int8"), *((x, w) for x in ("float32", "bfloat16") for w in KEPT)]
PAIRS += [("float32", "float32")]
SIZES = [(1, 1, 1), (1, 64, 24), (2, 1025, 13), (3, 31, 5), (4, 129, 97), (7, 2817, 3), (15, 16, 12), (16, 50, 65)]
SIZES += [(5, 1024, 30), (8, 2817, 49), (9, 2050, 12), (17, 2050, 30), (33, 7, 200), (100, 1024, 49), (300, 131, 28)]
RNG = np.random.default_rng(0)

needs_them = pytest.mark.skipif(LIBRARY is None, reason="the kernels were not built: there was no C++ compiler")


@pytest.fixture
def set_level():
    """Sets the level, and puts it back in the end."""
    library = ctypes.CDLL(os.fspath(LIBRARY))
    best = library.jaxinfer_level(len(cpu.LEVELS) - 1)

    def to(name):
        wanted = cpu.LEVELS.index(name)
        if wanted > best:
            pytest.skip(f"this CPU has no {name}")
        assert library.jaxinfer_level(wanted) == wanted

    yield to
    library.jaxinfer_level(cpu.LEVELS.index(cpu.kernels().level or cpu.LEVELS[0]))


NO_TABLE = np.zeros(0, np.float32)


def random(shape, dtype):
    if dtype == "int8":
        return RNG.integers(-128, 128, shape).astype(np.int8)
    return np.asarray(RNG.normal(size=shape), jnp.dtype(dtype))


def by_kernel(x, w, rounds=True):
    kind = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    return jax.ffi.ffi_call(cpu.DOT, [jax.ShapeDtypeStruct((x.shape[0], w.shape[0]), kind)])(x, w, rounds=rounds)[0]


def check(x, w, got, level, rounds):
    wide, kept = np.asarray(x, np.float64), np.asarray(w, np.float64)
    expected = wide @ kept.T
    if got.dtype == jnp.int32:
        np.testing.assert_array_equal(got, expected)
        return
    rounds = rounds and level == "avx512" and len(x) >= 16 and x.dtype == jnp.float32 and w.dtype != jnp.float32
    size = np.sqrt((wide**2) @ (kept**2).T)  # of what is summed
    assert np.max(np.abs(got - expected) / size) < (1.2e-2 if rounds else 2e-5)


@needs_them
@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize(("activations", "weights"), PAIRS)
def test_products(activations, weights, rounds, set_level):
    call = jax.jit(functools.partial(by_kernel, rounds=rounds))
    for tokens, depth, columns in SIZES:
        x, w = random((tokens, depth), activations), random((columns, depth), weights)
        for level in cpu.LEVELS[: cpu.LEVELS.index(cpu.kernels().level) + 1]:
            set_level(level)
            check(x, w, np.asarray(call(x, w)), level, rounds)


@needs_them
@pytest.mark.parametrize("activations", ["float32", "bfloat16"])
@pytest.mark.parametrize(("size", "with_zeros"), [(32, False), (128, True)])
def test_products_of_int4(activations, size, with_zeros, set_level):
    for tokens, groups, columns in ((1, 1, 1), (3, 5, 13), (6, 2, 65), (9, 3, 5), (16, 1, 30), (47, 9, 49)):
        depth = groups * size
        x, w = random((tokens, depth), activations), RNG.integers(-8, 8, (columns, depth)).astype(np.int8)
        scales = RNG.uniform(0.5, 2, (columns, groups)).astype(np.float32)
        values = ((w[:, ::2] & 15) | (w[:, 1::2] << 4)).astype(np.uint8)
        zeros = RNG.integers(-8, 8, (columns, groups)).astype(np.int8)
        w = w - np.repeat(zeros, size, axis=1) if with_zeros else w
        out = [jax.ShapeDtypeStruct((tokens, columns), jnp.float32)]
        for rounds, level in itertools.product((False, True), cpu.LEVELS[: cpu.LEVELS.index(cpu.kernels().level) + 1]):
            set_level(level)
            call = jax.jit(functools.partial(jax.ffi.ffi_call(cpu.INT4, out), rounds=rounds, table=NO_TABLE))
            got = call(x, values, scales, *([zeros] if with_zeros else []))[0]
            wide, kept = np.asarray(x, np.float64), w * np.repeat(scales.astype(np.float64), size, axis=1)
            error = np.abs(np.asarray(got) - wide @ kept.T) / np.sqrt((wide**2) @ (kept**2).T)
            rounded = level == "avx512" and tokens >= 16 and (rounds or activations == "bfloat16")
            assert np.max(error) < (1.5e-2 if rounded else 1e-5)


@needs_them
@pytest.mark.parametrize(("activations", "weights"), PAIRS)
def test_zeros_at_the_end_are_left_out(activations, weights, set_level):
    """As padding is: the bits of the others are as without, and what was left out did not meet weights that are NaN."""
    call = jax.jit(by_kernel)
    for tokens, live in ((4, 3), (17, 1), (40, 19), (64, 0), (300, 131)):
        x, w = random((tokens, 130), activations), random((29, 130), weights)
        x[live:] = 0
        signed = x.copy()
        signed[live + 1 :] *= -1  # zeros that have a sign
        broken = np.full_like(w, np.nan) if weights != "int8" else w
        for level in cpu.LEVELS[: cpu.LEVELS.index(cpu.kernels().level) + 1]:
            set_level(level)
            got = np.asarray(call(signed, w))
            assert not got[live:].any()
            if live:
                others = x.copy()
                others[live:] = random((tokens - live, 130), activations)
                np.testing.assert_array_equal(got[:live], np.asarray(call(others, w))[:live])
            assert np.isfinite(np.asarray(call(x, broken), np.float64)[max(live, 1) :]).all()


@needs_them
@pytest.mark.parametrize("powers", [False, True])
def test_products_of_tables(powers, set_level):
    """Of places in 16 numbers, with scales in float32 or powers of two."""
    table = RNG.normal(size=16).astype(np.float32)
    for tokens, groups, columns in ((1, 1, 1), (3, 5, 13), (6, 2, 65), (9, 3, 5), (47, 9, 49)):
        depth = groups * 32
        x, w = random((tokens, depth), "float32"), RNG.integers(0, 16, (columns, depth)).astype(np.uint8)
        scales = RNG.uniform(0.5, 2, (columns, groups)).astype(np.float32)
        scales = (2.0 ** RNG.integers(-9, 9, (columns, groups))).astype(jnp.float8_e8m0fnu) if powers else scales
        out = [jax.ShapeDtypeStruct((tokens, columns), jnp.float32)]
        kept = table[w].astype(np.float64) * np.repeat(scales.astype(np.float64), 32, axis=1)
        for level in cpu.LEVELS[: cpu.LEVELS.index(cpu.kernels().level) + 1]:
            set_level(level)
            call = jax.jit(functools.partial(jax.ffi.ffi_call(cpu.INT4, out), rounds=False, table=table))
            got = np.asarray(call(x, w[:, ::2] | w[:, 1::2] << 4, scales)[0])
            wide = x.astype(np.float64)
            assert np.max(np.abs(got - wide @ kept.T) / np.sqrt((wide**2) @ (kept**2).T)) < 1e-5


@needs_them
def test_a_table_of_another_size_is_refused():
    call = jax.ffi.ffi_call(cpu.INT4, [jax.ShapeDtypeStruct((1, 1), jnp.float32)])
    values, scales = np.zeros((1, 16), np.uint8), np.ones((1, 1), np.float32)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a table must have 16 numbers"):
        call(random((1, 32), "float32"), values, scales, rounds=False, table=np.zeros(15, np.float32))


@needs_them
@pytest.mark.parametrize("tokens", [2, 40])
def test_always_the_same_bits_and_each_token_its_own(tokens):
    """Whatever threads did what; and a token's product doesn't depend on the others (of few, of many)."""
    x, w = random((tokens, 500), "float32"), random((300, 500), "bfloat16")
    call = jax.jit(by_kernel)
    first = np.asarray(call(x, w))
    for _ in range(1000):
        np.testing.assert_array_equal(call(x, w), first)
    np.testing.assert_array_equal(call(x[: tokens // 2], w), first[: tokens // 2])


@needs_them
def test_attention_and_int4_always_the_same_bits():
    """Of prompts and of a row that decodes, at once."""
    q, pool = random((60, 2, 3, 32), "float32"), random((2, 9, 2, 8, 32), "float32")
    cu_q_lens, kv_lens = np.array([0, 1, 30, 60], np.int32), np.array([20, 29, 47], np.int32)
    pages = np.arange(18, dtype=np.int32).reshape(3, 6) % 9
    options = {"scale": np.float32(0.2), "soft_cap": np.float32(2), "window": np.int64(0)}
    attend = functools.partial(jax.ffi.ffi_call(cpu.ATTEND, jax.ShapeDtypeStruct(q.shape, q.dtype)), **options)
    x, values, scales = (
        random((5, 256), "float32"),
        random((300, 128), "int8").view(np.uint8),
        random((300, 8), "float32"),
    )
    out = [jax.ShapeDtypeStruct((5, 300), jnp.float32)]
    product = functools.partial(jax.ffi.ffi_call(cpu.INT4, out), rounds=True, table=NO_TABLE)
    calls = (
        (jax.jit(attend), (q, random(6, "float32"), cu_q_lens, kv_lens, pages, *pool)),
        (jax.jit(product), (x, values, scales)),
    )
    for call, arguments in calls:
        first = np.asarray(jax.tree.leaves(call(*arguments))[0])
        assert np.abs(first).max() > 0
        for _ in range(1000):
            np.testing.assert_array_equal(jax.tree.leaves(call(*arguments))[0], first)


@needs_them
def test_not_finite_stays_in_its_row():
    x, w = random((20, 48), "float32"), random((30, 48), "int8")
    x[3, 5], x[7, 9] = np.nan, np.inf
    for some in (slice(0, 8), slice(0, 20)):
        got = np.isfinite(jax.jit(by_kernel)(x[some], w)).all(axis=1)
        assert [i for i, fine in enumerate(got) if not fine] == [3, 7]


def by_xla(x, w):
    return products.by_xla(x, [w])[0]


def by_them(x, w, axes=None):
    return products.products(x, (w,), [axes])[0]


def used(*shapes):
    """Whether a kernel is called in the program that is made for the CPU."""
    return cpu.DOT in jax.jit(lambda x, w: by_them(x, w)).lower(*shapes).as_text()


@needs_them
def test_where_they_apply():
    def of(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    for x, w in PAIRS:
        assert used(of(x, 4, 64), of(w, 24, 64)), (x, w)
    assert not used(of("float16", 4, 64), of("float16", 24, 64))
    assert not used(of("float32", 2, 4, 64), of("int8", 24, 64))
    for_tpu = jax.jit(by_them).trace(of("float32", 4, 64), of("bfloat16", 24, 64))
    assert cpu.DOT not in for_tpu.lower(lowering_platforms=("tpu",)).as_text()


@needs_them
def test_of_many_and_its_gradient():
    x, w = random((3, 4, 64), "float32"), random((24, 64), "float32")
    expected = jnp.stack([by_xla(matrix, w) for matrix in x])
    for axes, some in (((0, None), w), ((0, 0), jnp.stack([w] * 3))):
        got = jax.jit(jax.vmap(by_them, in_axes=axes))(x, some)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    gradients = [jax.grad(lambda x, w, f=f: jnp.sum(f(x, w) ** 2), argnums=(0, 1))(x[0], w) for f in (by_xla, by_them)]
    for gradient, other in zip(*gradients, strict=True):
        np.testing.assert_allclose(gradient, other, rtol=1e-3, atol=1e-3)
    assert jax.grad(lambda x: jnp.sum(by_them(x, random((24, 64), "int8"))))(x[0]).shape == (4, 64)


@needs_them
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int8-w8a8", "int4"])
def test_at_once(kind):
    """Several weights of one x, as one at a time."""
    x = random((5, 64), "float32")
    if kind in SCHEMES:
        scheme = SCHEMES[kind]
        made = (quantize(random((n, 64), "float32"), scheme) for n in (24, 7, 40))
        weights = [QArray(*map(jnp.asarray, arrays), scheme) for arrays in made]
    else:
        weights = [Dense(jnp.asarray(random((n, 64), kind))) for n in (24, 7, 40)]
    together = jax.jit(lambda x, w: dots(x, w))
    assert together.lower(x, weights).as_text().count(f"@{cpu.INT4 if kind == 'int4' else cpu.DOT}(") == 1
    for got, weight in zip(together(x, weights), weights, strict=True):
        np.testing.assert_array_equal(got, jax.jit(dot)(x, weight))


@needs_them
def test_on_a_mesh():
    """Each device multiplies its own part, also where the caller leaves it to XLA what is split; `in` is summed."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4, 1), ("data", *TENSOR), axis_types=(AxisType.Auto,) * 3)
    x, w = random((8, 64), "float32"), random((24, 64), "bfloat16")
    specs = (PartitionSpec("data"), PartitionSpec(TENSOR[0])), PartitionSpec("data", TENSOR[0])
    own = jax.jit(jax.shard_map(by_them, mesh=mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False))
    assert cpu.DOT in own.lower(x, w).as_text()
    np.testing.assert_allclose(own(x, w), by_xla(x, w), rtol=1e-4, atol=1e-4)
    rows = (PartitionSpec("data"), PartitionSpec()), PartitionSpec("data")
    for axes in (("heads", "embed"), ("embed", "mlp"), None):
        kernel = functools.partial(by_them, axes=axes)
        call = jax.shard_map(
            kernel, mesh=mesh, axis_names={"data"}, in_specs=rows[0], out_specs=rows[1], check_vma=False
        )
        split = NamedSharding(mesh, PartitionSpec() if axes is None else on_axes(axes, TENSOR))
        placed = jax.device_put(w, split)
        program = jax.jit(call).lower(x, placed).compile()
        assert (cpu.DOT in program.as_text()) == (axes is not None)
        assert "all-gather" not in program.as_text()
        np.testing.assert_allclose(program(x, placed), by_xla(x, w), rtol=1e-4, atol=1e-4)


@needs_them
def test_rows_of_a_table():
    table, ids = Dense(jnp.asarray(random((50, 24), "bfloat16"))), np.array([3, 0, 49, 50, 2**30, 3], np.int32)
    got = jax.jit(take, static_argnums=2)(table, ids, "float32")
    np.testing.assert_array_equal(got, np.asarray(table.array, np.float32)[np.minimum(ids, 49)])
    assert cpu.TAKE in jax.jit(take, static_argnums=2).lower(table, ids, "float32").as_text()


def test_without_them(monkeypatch, tmp_path):
    find = cpu.kernels.__wrapped__
    monkeypatch.setenv(cpu.VARIABLE, "none")
    assert find() == (None, "JAXINFER_CPU_KERNELS is none")
    monkeypatch.setenv(cpu.VARIABLE, "sse9")
    with pytest.raises(ValueError, match="JAXINFER_CPU_KERNELS is 'sse9': it must be one of portable, avx2, avx512"):
        find()
    monkeypatch.delenv(cpu.VARIABLE)
    monkeypatch.setattr(cpu, "__file__", os.fspath(tmp_path / "__init__.py"))
    assert find().level is None
    assert "they were not built: install a C++ compiler" in find().why
    (tmp_path / f"_kernels{importlib.machinery.EXTENSION_SUFFIXES[0]}").write_bytes(b"no library")
    assert "can't be loaded" in find().why
    monkeypatch.setattr(cpu, "kernels", find)
    assert not used(*(jax.ShapeDtypeStruct((n, 64), jnp.dtype("bfloat16")) for n in (4, 24)))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_tanh_of_scores(tmp_path):
    """Against float64, in units of the last place: at each level, of all sizes and around the ends."""
    source, library = Path(__file__).with_name("tangent.cc"), tmp_path / "tangent.so"
    flags = ["-O1", "-std=c++17", "-shared", "-fPIC", "-w", f"-I{FOLDER}", "-isystem", jax.ffi.include_dir()]
    subprocess.run(["g++", *flags, str(source), "-o", str(library)], check=True)
    built = ctypes.CDLL(os.fspath(library))
    around = RNG.normal(size=2**21) * np.exp2(RNG.uniform(-30, 6, 2**21))
    ends = [0, -0.0, 1e-40, 3e38, -np.inf, np.inf, np.nan, 1e-45] * 2
    x = np.concatenate([np.linspace(-12, 12, 2**21), around, ends]).astype(np.float32)
    expected = np.tanh(x.astype(np.float64))
    for level in range(built.jaxinfer_level(len(cpu.LEVELS) - 1) + 1):
        built.jaxinfer_level(level)
        got = x.copy()
        built.tangent(got.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(len(x)))
        with np.errstate(invalid="ignore"):
            errors = np.abs(got - expected) / np.spacing(np.abs(expected).astype(np.float32))
        print(cpu.LEVELS[level], np.nanmax(errors))
        assert np.nanmax(errors) < 3
        np.testing.assert_array_equal(np.isnan(got), np.isnan(x))
        assert np.nanmax(np.abs(got)) == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.skipif(sys.platform != "linux", reason="preloads the sanitizer's library, as Linux does")
def test_no_access_out_of_bounds_and_nothing_undefined(tmp_path):
    """With AddressSanitizer and UBSan, each level, on arrays that end where a page of poison begins."""
    library = tmp_path / f"_kernels{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    flags = ["-O1", "-g", "-std=c++17", "-shared", "-fPIC", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    include = ["-isystem", jax.ffi.include_dir()]
    subprocess.run(["g++", *flags, *include, str(FOLDER / "handlers.cc"), "-o", str(library)], check=True)
    # libstdc++ too, or the sanitizer doesn't find what throws exceptions.
    find = [["g++", f"-print-file-name={name}"] for name in ("libasan.so", "libstdc++.so")]
    libraries = [subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() for command in find]
    environment = os.environ | {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.under_sanitizers", library],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[:3000]
    assert done.stdout.splitlines()[-1] == f"{len(SIZES) * len(PAIRS)} products at each level"
