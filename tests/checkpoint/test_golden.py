"""What bitsandbytes and MLX have written, against what they themselves read in it: see golden/make.py."""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.checkpoint.quantized import decode, wanted_tensors
from jaxinfer.checkpoint.safetensors import SafetensorsFile
from jaxinfer.quantization.quantize import quantize
from jaxinfer.quantization.schemes import SCHEMES
from jaxinfer.quantization.stored import stored_quantization
from jaxinfer.weights import QArray, dot, take

GOLDEN = {}
for path in sorted((Path(__file__).parent / "golden").glob("*.safetensors")):
    with SafetensorsFile(path) as file:
        for name, info in file.tensors.items():
            case, suffix = name.split(":")
            GOLDEN.setdefault(f"{path.stem} {case}", {})[suffix] = file.read(info)


def read(case):
    """The format, by its config.json, the tensors and the shape."""
    method, kind, rows, columns, size = re.fullmatch(r"(\w+) (\S+) (\d+)x(\d+)/(\d+)", case).groups()
    if kind == "mxfp4":
        config = {"bits": 4, "group_size": int(size), "mode": kind}
    elif method == "mlx":
        config = {"bits": int(kind), "group_size": int(size)}
    elif kind == "int8":
        config = {"quant_method": method, "load_in_8bit": True}
    else:
        config = {"quant_method": method, "load_in_4bit": True, "bnb_4bit_quant_type": kind.split("-")[0]}
        config |= {"bnb_4bit_blocksize": int(size)}
    form = stored_quantization({"quantization_config": config}).format_of("model.layers.0.mlp.up_proj", "Linear")
    stored = {name: tensor for name, tensor in GOLDEN[case].items() if name not in ("expected", "original")}
    return form, stored, (int(rows), int(columns))


@pytest.mark.parametrize("case", GOLDEN)
def test_what_they_read(case):
    form, stored, shape = read(case)
    wanted = wanted_tensors(form, *shape)
    assert {name for name, tensor in wanted.items() if not tensor.optional} <= stored.keys() <= wanted.keys()
    for name, array in stored.items():
        assert wanted[name].fits(array.shape)
        assert array.dtype in wanted[name].dtypes
    decoded = decode(form, stored, *shape)
    expected = GOLDEN[case]["expected"]
    np.testing.assert_allclose(decoded.floats(np.dtype(np.float32)), expected, rtol=2e-7, atol=2e-7)
    part = decoded.rows(slice(1, 4)).floats(np.dtype(np.float32))
    np.testing.assert_allclose(part, expected[1:4], rtol=2e-7, atol=2e-7)
    # Packed as they are, looked up and multiplied with.
    scheme = form.scheme(*shape)
    kept = decoded.kept(scheme)
    assert {suffix: (array.shape, str(array.dtype)) for suffix, array in kept.items()} == scheme.arrays(*shape)
    arrays = {suffix: jnp.asarray(array) for suffix, array in kept.items()}
    held = QArray(arrays[""], arrays["_scale"], scheme, bias=arrays.get("_bias"))
    rows = take(held, jnp.arange(shape[0]), "float32")
    np.testing.assert_allclose(rows, expected, rtol=1e-6, atol=1e-6)
    x = np.random.default_rng(0).standard_normal((3, shape[1]), np.float32)
    exact = x.astype(np.float64) @ expected.T.astype(np.float64)
    np.testing.assert_allclose(dot(jnp.asarray(x), held), exact, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("case", [case for case in GOLDEN if " nf4 " in case and case.endswith("/64")])
def test_quantized_as_they_do(case):
    _, stored, shape = read(case)
    original = GOLDEN[case]["original"]
    if shape[1] % 64:
        original = original.reshape(-1)[: original.size // 64 * 64].reshape(-1, 64)  # its whole blocks
    values, scales = quantize(original, SCHEMES["nf4"])
    theirs = stored["weight"][: values.size, 0]
    ours = values.reshape(-1)
    swapped = ours << 4 | ours >> 4
    used = np.repeat(np.abs(original).reshape(-1, 64).max(axis=1) > 0, 32)  # of zeros they have no place
    np.testing.assert_array_equal(swapped[used], theirs[used])
    absmax = stored["weight.absmax"][: scales.size]
    np.testing.assert_allclose(scales.reshape(-1), absmax, rtol=1e-6, atol=1e-30)
