"""Checkpoint to parameters: strict both ways, in any float type, with bounded memory."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxinfer.checkpoint.folder import Checkpoint
from jaxinfer.checkpoint.load import load_params
from jaxinfer.models.model import AbstractModel, Params

LLAMA = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GPT2 = {"model_type": "gpt2", "vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}
TYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


def tensors(config: dict[str, Any], dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Random tensors as a checkpoint of this configuration has them."""
    rng = np.random.default_rng(0)
    model = AbstractModel.from_config(config, "float32")
    made: dict[str, np.ndarray] = {}
    for spec in model.params.values():
        for name, shape in spec.source.tensors(spec.shape).items():
            made[name] = rng.standard_normal(shape).astype(dtype)
    return made


def load(folder: Path, config: dict[str, Any], stored: dict[str, np.ndarray], dtype: Any = np.float32) -> Params:
    save_file(stored, folder / "model.safetensors")
    with Checkpoint(folder) as checkpoint:
        return load_params(AbstractModel.from_config(config, dtype), checkpoint, jax.devices()[0])


def refusal(folder: Path, config: dict[str, Any], stored: dict[str, np.ndarray], dtype: Any = np.float32) -> str:
    with pytest.raises(ValueError) as error:
        load(folder, config, stored, dtype)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("stored", TYPES)
def test_each_float_type_into_each(tmp_path, stored, dtype):
    made = tensors(LLAMA, stored)
    params = load(tmp_path, LLAMA, made, dtype)
    assert params.keys() == made.keys()
    for name, param in params.items():
        assert param.dtype == dtype
        np.testing.assert_array_equal(np.asarray(param), made[name].astype(dtype))
        assert param.devices() == {jax.devices()[0]}


def test_float64_is_read_too(tmp_path):
    made = tensors(LLAMA, np.float64)
    params = load(tmp_path, LLAMA, made)
    np.testing.assert_array_equal(params["model.norm.weight"], made["model.norm.weight"].astype(np.float32))


def test_gpt2_is_split_and_transposed(tmp_path):
    """c_attn is `[in, 3 * out]`: q, k and v side by side."""
    made = tensors(GPT2)
    params = load(tmp_path, GPT2, made)
    assert len(params) == len(made) + 2 * 2 * 2  # weight and bias of c_attn become three each, in two layers
    for layer in range(2):
        block = f"transformer.h.{layer}"
        weight, bias = made[f"{block}.attn.c_attn.weight"], made[f"{block}.attn.c_attn.bias"]
        assert weight.shape == (16, 48)
        for i, part in enumerate("qkv"):
            there = slice(16 * i, 16 * (i + 1))
            np.testing.assert_array_equal(params[f"{block}.attn.{part}_proj.weight"], weight[:, there].T)
            np.testing.assert_array_equal(params[f"{block}.attn.{part}_proj.bias"], bias[there])
        for name in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            np.testing.assert_array_equal(params[f"{block}.{name}.weight"], made[f"{block}.{name}.weight"].T)
    np.testing.assert_array_equal(params["transformer.wte.weight"], made["transformer.wte.weight"])


@pytest.mark.parametrize(("config", "prefix"), [(LLAMA, "model."), (GPT2, "transformer.")])
def test_names_without_the_prefix(tmp_path, config, prefix):
    made = tensors(config)
    params = load(tmp_path, config, {name.removeprefix(prefix): tensor for name, tensor in made.items()})
    expected = load(tmp_path, config, made)
    assert params.keys() == expected.keys()
    for name in params:
        np.testing.assert_array_equal(params[name], expected[name])


def test_what_old_checkpoints_carry_is_passed_over(tmp_path):
    made = tensors(LLAMA | {"tie_word_embeddings": True})
    more = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32),
        "model.rotary_emb.inv_freq": np.ones(2, np.float32),
        "lm_head.weight": made["model.embed_tokens.weight"],
    }
    assert load(tmp_path, LLAMA | {"tie_word_embeddings": True}, made | more).keys() == made.keys()
    # Untied, the head is a weight as any other.
    assert "lm_head.weight" in refusal(tmp_path, LLAMA, made)


def test_all_that_is_wrong_is_in_one_error(tmp_path):
    made = tensors(LLAMA)
    del made["model.norm.weight"], made["model.layers.1.mlp.up_proj.weight"]
    made["layers.0.mlp.up_proj.weight"] = made["model.layers.0.mlp.up_proj.weight"]
    made["model.layers.2.mlp.up_proj.weight"] = made["model.layers.0.mlp.up_proj.weight"]
    made["model.embed_tokens.scales"] = np.ones(3, np.float32)
    made["model.layers.0.self_attn.k_proj.weight"] = np.ones((16, 16), np.float32)
    made["model.layers.1.self_attn.q_proj.weight"] = np.ones(16 * 16, np.float32)
    made["model.layers.0.self_attn.o_proj.weight"] = np.ones((16, 16), np.int8)
    assert refusal(tmp_path, LLAMA, made) == (
        f"{tmp_path}: does not fit its config.json: "
        "missing tensors: model.layers.1.mlp.up_proj.weight, model.norm.weight; "
        "unknown tensors: model.embed_tokens.scales, model.layers.2.mlp.up_proj.weight; "
        "tensors stored twice: model.layers.0.mlp.up_proj.weight (also as layers.0.mlp.up_proj.weight); "
        "wrong shapes: model.layers.0.self_attn.k_proj.weight [16, 16] instead of [8, 16], "
        "model.layers.1.self_attn.q_proj.weight [256] instead of [16, 16]; "
        "wrong dtypes (bfloat16, float16, float32 and float64 are read): model.layers.0.self_attn.o_proj.weight is int8"
    )


def test_a_misshaped_fused_tensor_is_named_once(tmp_path):
    made = tensors(GPT2)
    made["transformer.h.0.attn.c_attn.weight"] = np.ones((48, 16), np.float32)
    message = refusal(tmp_path, GPT2, made)
    assert message.count("transformer.h.0.attn.c_attn.weight [48, 16] instead of [16, 48]") == 1
    assert message.count("c_attn") == 1


def test_a_whole_other_model_makes_a_message_of_bounded_length(tmp_path):
    assert len(refusal(tmp_path, LLAMA | {"num_hidden_layers": 90}, tensors(GPT2))) < 3000


def test_values_beyond_float16_are_refused_and_not_made_infinite(tmp_path):
    made = tensors(LLAMA)
    made["model.norm.weight"][3] = 7e4
    message = refusal(tmp_path, LLAMA, made, np.float16)
    assert "model.norm.weight: has values beyond float16's 65504; use dtype bfloat16 or float32" in message
    params = load(tmp_path, LLAMA, made, ml_dtypes.bfloat16)
    assert np.isfinite(np.asarray(params["model.norm.weight"], np.float32)).all()


def test_progress_adds_up_to_the_file(tmp_path):
    save_file(tensors(GPT2), tmp_path / "model.safetensors")
    seen: list[int] = []
    with Checkpoint(tmp_path) as checkpoint:
        load_params(AbstractModel.from_config(GPT2, "float32"), checkpoint, jax.devices()[0], seen.append)
        assert sum(seen) == checkpoint.nbytes == checkpoint.bytes_read


# In a process of its own, whose peak is VmHWM. Prints what loading added to it, in MiB.
PEAK = """
import json, re, sys
import jax
from jaxinfer.checkpoint.folder import Checkpoint
from jaxinfer.checkpoint.load import load_params
from jaxinfer.models.model import AbstractModel
folder, config, *how = sys.argv[1], json.loads(sys.argv[2]), *sys.argv[3:]
model = AbstractModel.from_config(config, *how)
jax.device_put(1.0).block_until_ready()
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) / 1024
before = peak()
with Checkpoint(folder) as checkpoint:
    params = load_params(model, checkpoint, jax.devices()[0])
print(peak() - before)
"""


def added_memory(folder: Path, config: dict[str, Any], *how: str) -> float:
    environment = os.environ | {"XLA_FLAGS": ""}
    command = [sys.executable, "-c", PEAK, str(folder), json.dumps(config), *how]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return float(output.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("config", "stored", "how"),
    [
        (LLAMA, ml_dtypes.bfloat16, ["float32"]),
        pytest.param(LLAMA, np.float32, ["float32"], marks=pytest.mark.slow),
        pytest.param(LLAMA, ml_dtypes.bfloat16, ["float16"], marks=pytest.mark.slow),
        pytest.param(GPT2, np.float32, ["float32"], marks=pytest.mark.slow),
        (LLAMA, ml_dtypes.bfloat16, ["bfloat16", "int8"]),
        pytest.param(GPT2, np.float32, ["float32", "fp8"], marks=pytest.mark.slow),
    ],
)
def test_peak_memory_is_the_result_and_about_one_tensor(tmp_path, config, stored, how):
    if config is LLAMA:
        config = LLAMA | {"hidden_size": 512, "intermediate_size": 4096, "vocab_size": 2000, "num_hidden_layers": 4}
    else:
        config = GPT2 | {"n_embd": 512, "n_inner": 4096, "n_layer": 6}
    if len(how) > 1:
        config |= {"num_hidden_layers": 8} if config["model_type"] == "llama" else {"n_layer": 16}
    made = tensors(config, stored)
    save_file(made, tmp_path / "model.safetensors")
    abstract = AbstractModel.from_config(config, *how).abstract.values()
    result = sum(a.size * a.dtype.itemsize for a in abstract) / 2**20
    largest = max(tensor.nbytes for tensor in made.values()) / 2**20
    assert result > 50
    added = added_memory(tmp_path, config, *how)
    quantizing = 20 if len(how) > 1 else 0  # a few times the 4 MB that are quantized at a time
    ends = 2 * (1 + result // 64)  # of huge pages that are not full
    assert 0.9 * result < added < result + 2 * largest + 4 + ends + quantizing
