"""What quantization leaves of weights, as a checkpoint; adapters that are merged onto it."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxinfer.checkpoint.dequantized import DequantizedCheckpoint
from jaxinfer.checkpoint.folder import Checkpoint
from jaxinfer.quantization.quantize import quantize
from jaxinfer.quantization.schemes import SCHEMES
from tests.adapters import write_adapter
from tests.checkpoint.formats import CASES, quantized
from tests.checkpoint.test_quantized import ARCHITECTURES, SMALL
from tests.models.test_gpt_oss import checkpoints as gpt_oss
from tests.plain import random_tensors, write_checkpoint
from tests.quantization.test_qarray import real


def left_of(folder, quantization=None, dtype="float32"):
    """The tensors, read as wholes and in part."""
    config = json.loads((folder / "config.json").read_text())
    with Checkpoint(folder) as base:
        checkpoint = DequantizedCheckpoint(base, config, dtype, quantization)
        assert "quantization_config" not in checkpoint.content
        tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
        for name, tensor in tensors.items():
            info, some = checkpoint.tensors[name], tuple(slice(1, size - 1) for size in tensor.shape)
            assert (info.shape, info.dtype) == (tensor.shape, tensor.dtype)
            np.testing.assert_array_equal(checkpoint.read(name, some), tensor[some])
    return tensors


def same(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(tensors[name], tensor, rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize(
    ("architecture", "name"),
    [("llama", "nf4"), ("qwen2", "mlx 4"), ("phi3", "fp8 of whole tensors"), ("gpt2", "gptq in another order")],
)
def test_of_a_quantized_checkpoint(architecture, name, tmp_path):
    case, config = CASES[name], ARCHITECTURES[architecture]
    stored, left = quantized(random_tensors(config), case)
    folder = write_checkpoint(tmp_path / "base", config | {"quantization_config": case.config}, stored)
    same(left_of(folder), left)


@pytest.mark.slow
def test_of_stacked_experts(tmp_path):
    """They are [E, out, in] in mxfp4, and [E, in, out] in floats."""
    stored, plain = gpt_oss(tmp_path)
    same(left_of(stored), load_file(plain / "model.safetensors"))


@pytest.mark.parametrize(
    ("architecture", "quantization"),
    [("gpt2", "nf4"), ("phi3", {"*.q_proj.*": "int4", "*.v_proj.*": "int8", "*.up_proj.*": "fp8"})],
)
def test_of_weights_in_floats(architecture, quantization, tmp_path):
    """Transposed ones, and parts of one tensor by schemes of their own."""
    config = ARCHITECTURES[architecture]
    tensors = random_tensors(config)

    def rounded(weight, scheme):
        return real(*quantize(weight, SCHEMES[scheme]), SCHEMES[scheme])

    expected = dict(tensors)
    for name, tensor in tensors.items():
        if architecture == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            parts = np.split(tensor.T, 3) if "c_attn" in name else [tensor.T]
            expected[name] = np.concatenate([rounded(part, "nf4") for part in parts]).T
        if name.endswith("qkv_proj.weight"):
            q, k, v = np.split(tensor, [128, 192])
            expected[name] = np.concatenate([rounded(q, "int4"), k, rounded(v, "int8")])
        if name.endswith("gate_up_proj.weight"):
            gate, up = np.split(tensor, 2)
            expected[name] = np.concatenate([gate, rounded(up, "fp8")])
    assert sum(not np.array_equal(expected[name], tensors[name]) for name in tensors) >= 2
    same(left_of(write_checkpoint(tmp_path / "base", config, tensors), quantization), expected)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base in nf4, one in floats, and an adapter of both; the tensors that are left of nf4."""
    folder = tmp_path_factory.mktemp("merged")
    tensors = random_tensors(SMALL)
    stored, left = quantized(tensors, CASES["nf4"])
    plain = write_checkpoint(folder / "floats", SMALL, tensors)
    write_checkpoint(folder / "nf4", SMALL | {"quantization_config": CASES["nf4"].config}, stored)
    return folder, write_adapter(folder / "adapter", plain, targets=("q_proj", "down_proj")), left


def test_merged_onto_it(folders, cli, tmp_path):
    folder, adapter, left = folders
    onto = ("--onto", "dequantized")
    code, out, err = cli("merge", folder / "nf4", adapter, tmp_path / "a", *onto)
    assert (code, err) == (0, "")
    assert "in float32, an adapter merged onto base weights: bitsandbytes, dequantized\n" in out
    merged, factors = load_file(tmp_path / "a" / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    assert "quantization_config" not in json.loads((tmp_path / "a" / "config.json").read_text())
    for name, tensor in left.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if (b := factors.get(f"{stem}.lora_B.weight")) is not None:
            tensor = tensor + b @ factors[f"{stem}.lora_A.weight"]
        np.testing.assert_allclose(merged[name], tensor, atol=1e-5, err_msg=name)
    patterns = ("--base-quantization", "*.mlp.*=nf4")
    report = cli("merge", folder / "floats", adapter, tmp_path / "b", *onto, *patterns, "--quantization", "int8").out
    assert "in int8, float32, an adapter merged onto base weights: " in report
    assert "nf4" in report
    assert "dequantized, and the sum rounded to the nearest\n" in report
    problem = cli("merge", folder / "floats", adapter, tmp_path / "x", *onto).error()
    assert "is not quantized: --base-quantization nf4 or another scheme says by what it was" in problem
    problem = cli("merge", folder / "nf4", adapter, tmp_path / "x", *onto, "--base-quantization", "int8").error()
    assert "is quantized (bitsandbytes) already: leave --base-quantization out" in problem
    problem = cli("merge", folder / "floats", adapter, tmp_path / "x", "--base-quantization", "nf4").error()
    assert "onto is 'original': it must be 'dequantized'" in problem


@pytest.mark.slow
def test_merged_then_calibrated(folders, cli, tmp_path):
    """`merge` and `quantize` in a row: what is written stands for the merged weights, by the step of its scales."""
    folder, adapter, _ = folders
    texts = tmp_path / "texts.txt"
    texts.write_text("The river runs under the bridge.\nA lamp, a stone and seven green papers.\n")
    assert cli("merge", folder / "floats", adapter, tmp_path / "merged").code == 0
    options = ("--scheme", "int8", "--method", "gptq", "--data", texts, "--format", "hf")
    assert cli("quantize", tmp_path / "merged", tmp_path / "int8", *options).code == 0
    merged, base = load_file(tmp_path / "merged" / "model.safetensors"), random_tensors(SMALL)
    for name, tensor in left_of(tmp_path / "int8").items():
        step = np.abs(merged[name]).max(axis=-1, keepdims=True) / 127
        assert np.all(np.abs(tensor - merged[name]) < 20 * step), name
    name = "model.layers.0.mlp.down_proj.weight"
    assert np.abs(merged[name] - base[name]).max() > 0.1
