"""Checkpoints of bitsandbytes and MLX: logits and bytes of what stays packed, what is converted, what is damaged."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxinfer.attention import ForwardBatch
from jaxinfer.checkpoint.files import read_config
from jaxinfer.checkpoint.open import load_weights, open_weights
from jaxinfer.checkpoint.settle import as_stored
from jaxinfer.convert import convert
from jaxinfer.models.model import AbstractModel
from jaxinfer.sharding import make_mesh
from tests.checkpoint.formats import CASES, quantized
from tests.checkpoint.test_quantized import ARCHITECTURES, SMALL, loaded
from tests.plain import CONFIG, random_tensors, write_checkpoint


def forward(model, params, mesh=None):
    """Logits of a few tokens."""
    batch = dataclasses.replace(ForwardBatch.of_sequences([[5, 17, 200, 33]]), mesh=mesh)
    return np.asarray(jax.jit(lambda params, batch: model.bind(params)(batch, None)[0])(params, batch))


@pytest.mark.parametrize(
    ("architecture", "name", "mesh", "bits"),
    [("llama", "nf4", "tensor=2", 4.5), ("qwen2", "mlx 3", "tensor=2", 5), ("phi3", "mlx 8", None, 9)],
)
def test_logits_of_packed_weights(architecture, name, mesh, bits, tmp_path):
    """As the floats that they stand for give them; and they have as many bytes as packed."""
    config = ARCHITECTURES[architecture] | {"hidden_size": 128, "intermediate_size": 128}
    case = CASES[name]
    stored, left = quantized(random_tensors(config), case)
    expected = forward(*loaded(tmp_path / "b", config, left))
    mesh = mesh and make_mesh(mesh, jax.devices(), 4, 2, 64)
    model, params = loaded(tmp_path / "a", config | {"quantization_config": case.config}, stored, mesh)
    np.testing.assert_allclose(forward(model, params, mesh)[:, : expected.shape[1]], expected, rtol=1e-4, atol=1e-4)
    for spec in model.params.values():
        if spec.scheme is not None:
            packed = sum(params[spec.name + suffix].nbytes for suffix in spec.arrays) * 8
            assert packed == bits * np.prod(spec.shape)
    assert all(spec.scheme for spec in model.params.values() if spec.stored)
    assert any(spec.scheme for spec in model.params.values())


def test_what_is_converted_is_said_once(tmp_path, caplog):
    """Blocks of 64 that go on over rows of 100 inputs have as few as four of them in common with each row."""
    config = SMALL | {"intermediate_size": 100, "num_hidden_layers": 2}
    stored, left = quantized(random_tensors(config), CASES["nf4"])
    model, params = loaded(tmp_path / "a", config | {"quantization_config": CASES["nf4"].config}, stored)
    (line,) = (record.getMessage() for record in caplog.records if "converted" in record.getMessage())
    name = "model.layers.1.mlp.down_proj.weight"
    assert "model.layers.*.mlp.down_proj.weight can't be kept packed as stored: converted to float32" in line
    assert "51,200 bytes instead of 9," in line
    assert name not in model.quantized
    np.testing.assert_allclose(np.asarray(params[name]), left[name], rtol=1e-6)


def test_of_single_modules():
    """Mixed-bit recipes of MLX: what is said of a module, or that it is left."""
    own = {"lm_head": {"group_size": 32, "bits": 6, "mode": "affine"}, "model.layers.0.mlp.up_proj": False}
    config = SMALL | {"quantization": CASES["mlx 4"].config | own}
    names = {name.split(".")[-2]: s.name for name, s in AbstractModel.from_config(config, "float32").quantized.items()}
    assert names["lm_head"] == "int8-g32-biases"
    assert names["embed_tokens"] == names["gate_proj"] == "int4-g64-biases"
    assert "up_proj" not in names
    assert "down_proj" not in names  # its 96 inputs are no groups of 64
    config["quantization"]["lm_head"] = {"group_size": 64, "bits": 9}
    with pytest.raises(ValueError, match=r"quantization_config.lm_head.bits is 9: 2, 3, 4, 5, 6, 8 can be read"):
        AbstractModel.from_config(config, "float32")


@pytest.mark.parametrize("name", ["nf4 of 128", "mlx 3"])
def test_converted(name, tmp_path):
    """In Orbax's format they stay as they are; compressed-tensors has no form for them."""
    config = CONFIG | {"num_hidden_layers": 1}
    stored, _ = quantized(random_tensors(config), CASES[name])
    said = {n: value for n, value in CASES[name].config.items() if n != "bnb_4bit_blocksize"}
    folder = write_checkpoint(tmp_path / "a", config | {"quantization_config": said}, stored)
    with pytest.raises(
        ValueError, match=r"format hf: .* is in \S+, which compressed-tensors has no form for: use format"
    ):
        convert(folder, tmp_path / "c", format="hf", show_progress=False)
    convert(folder, tmp_path / "b", show_progress=False)
    both = []
    for place in (folder, tmp_path / "b"):
        with open_weights(place) as weights:
            model = AbstractModel.from_config(as_stored(read_config(place), weights), "float32")
            both.append(load_weights(model, weights, jax.devices()[0]))
    assert both[0].keys() == both[1].keys()
    assert any(array.dtype == np.uint8 for array in both[1].values())
    for key, array in both[0].items():
        np.testing.assert_array_equal(np.asarray(both[1][key]), np.asarray(array), err_msg=key)


STATE = "weight.quant_state.bitsandbytes__nf4"
NF4 = {"blocksize": 64, "quant_type": "nf4", "shape": [96, 64]}


@pytest.mark.parametrize(
    ("name", "suffix", "value", "what"),
    [
        ("nf4", "weight.absmax", None, "missing tensors: model.layers.0.mlp.up_proj.weight.absmax"),
        ("nf4", "weight.absmax", np.zeros(95, np.uint8), r"wrong shapes: .*absmax \[95\] instead of \[96\]"),
        ("nf4", "weight.absmax", np.ones(96, np.float32), "up_proj: has scales of scales, and an absmax in float32"),
        ("nf4", "weight.quant_map", np.zeros(15, np.float32), r"wrong shapes: .*quant_map \[15\] instead of \[16\]"),
        (
            "nf4",
            "weight.quant_map",
            np.full(16, np.nan, np.float32),
            "up_proj: has a quant_map that is not that of nf4",
        ),
        ("nf4", "weight.quant_map", np.linspace(-1, 1, 16, dtype=np.float32), "a quant_map that is not that of nf4"),
        ("nf4", "weight.nested_absmax", None, "up_proj: has an absmax in uint8, and no nested_absmax or"),
        ("nf4", "weight.nested_quant_map", None, "up_proj: has an absmax in uint8, and no nested_absmax or"),
        ("nf4", "weight.nested_absmax", np.full(1, np.inf, np.float32), "up_proj: has an absmax that is not finite"),
        ("nf4", STATE, None, "missing tensors: .*up_proj.weight.quant_state.bitsandbytes__nf4"),
        ("nf4", STATE, {}, "up_proj: has blocksize None in its quant_state: 32, 64"),
        ("nf4", STATE, {"blocksize": 64.0}, r"up_proj: has blocksize 64\.0 in its quant_state"),
        ("nf4", STATE, {"blocksize": 2**70}, "up_proj: has blocksize 1180591620717411303424 in its quant_state"),
        (
            "nf4",
            STATE,
            {"blocksize": 128, "quant_type": "nf4"},
            "up_proj: has blocksize 128 in its quant_state instead",
        ),
        (
            "nf4",
            STATE,
            {"blocksize": 64, "quant_type": "fp4"},
            "up_proj: has quant_type 'fp4' in its quant_state instead",
        ),
        ("nf4", STATE, NF4 | {"shape": [96, 2**40]}, r"has shape \[96, 1099511627776\] in its quant_state instead of"),
        ("nf4", STATE, NF4 | {"shape": "x" * 999}, "has shape 'x{99} in its quant_state instead of"),
        ("nf4", STATE, NF4, "up_proj: has nested_offset None and nested_blocksize None in its quant_state"),
        ("nf4", STATE, NF4 | {"nested_blocksize": 256, "nested_offset": float("inf")}, "an absmax that is not finite"),
        ("nf4", STATE, NF4 | {"nested_blocksize": 2**60, "nested_offset": 0.5}, "nested_blocksize 1152921504606846976"),
        ("nf4", STATE, [64], "up_proj: has a quant_state that is no JSON object"),
        ("nf4", STATE, np.frombuffer(b"[" * 4000, np.uint8), "up_proj: has a quant_state that is no JSON object"),
        ("nf4", STATE, np.zeros(5000, np.uint8), r"wrong shapes: .*nf4 \[5000\] instead of at most \[4096\]"),
        ("nf4", "weight", np.zeros((3072, 1), np.float32), "up_proj: has 12288 bytes of values"),
        ("nf4", "weight", np.zeros((1536, 1), np.uint8), "up_proj: has 1536 bytes of values instead of 3072"),
        ("llm.int8", "weight_format", np.array([1], np.uint8), r"up_proj: has weight_format \[1\]: 0, rows one after"),
        ("llm.int8", "SCB", None, "missing tensors: model.layers.0.mlp.up_proj.SCB"),
        ("mlx 2", "biases", None, "missing tensors: model.layers.0.mlp.up_proj.biases"),
        (
            "mlx 2",
            "weight",
            np.zeros((96, 5), np.uint32),
            r"wrong shapes: .*up_proj.weight \[96, 5\] instead of \[96, 4\]",
        ),
        ("mlx 4", "biases", np.zeros((96, 2), np.float16), r"wrong shapes: .*biases \[96, 2\] instead of \[96, 1\]"),
        ("mlx 4", "scales", np.full((96, 1), np.nan, np.float16), "up_proj: has scales or biases that are not finite"),
    ],
)
def test_damaged(name, suffix, value, what, tmp_path):
    if isinstance(value, dict | list):
        value = np.frombuffer(json.dumps(value).encode(), np.uint8)
    stored, _ = quantized(random_tensors(SMALL), CASES[name])
    key = f"model.layers.0.mlp.up_proj.{suffix}"
    stored = {n: t for n, t in stored.items() if n != key} | ({} if value is None else {key: value})
    with pytest.raises(ValueError, match=what):
        loaded(tmp_path / "m", SMALL | {"quantization_config": CASES[name].config}, stored)
