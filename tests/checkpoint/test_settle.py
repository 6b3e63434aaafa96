"""A config.json that says one thing, and tensors that are another: the tensors count, for all who ask."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxinfer.calibrate import calibrate
from jaxinfer.checkpoint.folder import Checkpoint
from jaxinfer.checkpoint.load import load_params
from jaxinfer.checkpoint.open import load_weights, open_weights
from jaxinfer.checkpoint.settle import as_stored
from jaxinfer.convert import convert
from jaxinfer.models.model import AbstractModel
from tests.checkpoint.formats import CASES, quantized
from tests.plain import random_tensors, write_checkpoint

LLAMA = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "tie_word_embeddings": True,
}
GPT2 = {"model_type": "gpt2", "vocab_size": 300, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
EMBEDDINGS = {"llama": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}
HEAD = "lm_head.weight"


def settled(folder, config, tensors):
    """What becomes of config.json, and the parameters."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    with Checkpoint(folder) as checkpoint:
        settled_config = as_stored(config, checkpoint)
        return settled_config, load_params(
            AbstractModel.from_config(settled_config, "float32"), checkpoint, jax.devices()[0]
        )


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("prefixed", [True, False])
def test_a_tied_model_with_a_head(tmp_path, config, prefixed):
    embedding = EMBEDDINGS[config["model_type"]]
    tensors = random_tensors(config)
    weight = tensors[embedding]
    other = weight.copy()
    other[-1, -1] += 1
    if not prefixed:
        tensors = {name.removeprefix(f"{embedding.split('.')[0]}."): tensor for name, tensor in tensors.items()}
    settled_config, params = settled(tmp_path, config, tensors | {HEAD: weight.copy()})
    assert settled_config == config
    assert HEAD not in params
    settled_config, params = settled(tmp_path, config, tensors | {HEAD: other})
    assert settled_config == config | {"tie_word_embeddings": False}
    np.testing.assert_array_equal(params[HEAD], other)
    np.testing.assert_array_equal(params[embedding], weight)


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_a_tied_model_with_the_head_alone(tmp_path, config):
    tensors = random_tensors(config)
    weight = tensors.pop(EMBEDDINGS[config["model_type"]])
    settled_config, params = settled(tmp_path, config, tensors | {HEAD: weight})
    assert settled_config == config
    np.testing.assert_array_equal(params[EMBEDDINGS[config["model_type"]]], weight)
    # A head is no embedding of a model that is not tied.
    with pytest.raises(ValueError, match=f"missing tensors: {EMBEDDINGS[config['model_type']]}"):
        settled(tmp_path, config | {"tie_word_embeddings": False}, tensors | {HEAD: weight})


def test_the_same_values_in_another_dtype_are_the_same(tmp_path):
    tensors = random_tensors(LLAMA)
    weight = tensors[EMBEDDINGS["llama"]].astype(ml_dtypes.bfloat16)
    weight[0, 0] = np.nan
    tensors[EMBEDDINGS["llama"]] = weight
    assert settled(tmp_path, LLAMA, tensors | {HEAD: weight.astype(np.float32)})[0] == LLAMA


def test_the_only_difference_in_a_later_block(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxinfer.checkpoint.settle.BLOCK", 7 * 32)
    tensors = random_tensors(LLAMA)
    head = tensors[EMBEDDINGS["llama"]].copy()
    assert settled(tmp_path, LLAMA, tensors | {HEAD: head})[0]["tie_word_embeddings"]
    head[250, 3] = 9
    assert not settled(tmp_path, LLAMA, tensors | {HEAD: head})[0]["tie_word_embeddings"]


def test_a_head_that_is_quantized_is_one_of_its_own(tmp_path):
    case = CASES["int4"]
    tensors, _ = quantized(random_tensors(LLAMA | {"tie_word_embeddings": False}), case)
    stored, _ = case.store(tensors.pop(HEAD))
    quantization = {**case.config, "ignore": ["re:.*k_proj"]}
    settled_config, params = settled(
        tmp_path,
        LLAMA | {"quantization_config": quantization},
        {n: np.ascontiguousarray(t) for n, t in (tensors | {f"lm_head.{n}": t for n, t in stored.items()}).items()},
    )
    assert not settled_config["tie_word_embeddings"]
    assert {HEAD, f"{HEAD}_scale"} <= params.keys()


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """A folder whose config.json ties what is not tied."""
    tensors = random_tensors(LLAMA | {"tie_word_embeddings": False})
    return write_checkpoint(tmp_path_factory.mktemp("untied") / "model", LLAMA, tensors)


@pytest.mark.parametrize("how", ["orbax", "hf", "gptq"])
def test_what_is_written_keeps_the_head_and_says_so(untied, tmp_path, how):
    output = tmp_path / "new"
    if how == "gptq":
        calibrate(untied, output, ["some text"], scheme="int8", method="gptq", format="hf", show_progress=False)
    else:
        convert(untied, output, format=how, show_progress=False)
    config = json.loads((output / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    with open_weights(output) as weights:
        assert as_stored(config, weights) == config
        params = load_weights(AbstractModel.from_config(config, "float32"), weights, jax.devices()[0])
    head = load_file(untied / "model.safetensors")[HEAD]
    got = np.asarray(params[HEAD], np.float32) * np.asarray(params.get(f"{HEAD}_scale", 1))
    np.testing.assert_allclose(got, head, atol=0 if how != "gptq" else 0.005)


def test_a_plan_follows_the_tensors_where_there_are_some(untied, tmp_path, cli):
    (tmp_path / "config.json").write_text((untied / "config.json").read_text())
    planned = [
        json.loads(cli("plan", folder, "--topology", "l4", "--dtype", "float32", "--json").out)["bytes"]["weights"]
        for folder in (untied, tmp_path)
    ]
    assert planned[0] - planned[1] == 300 * 32 * 4


# quantization_config


@pytest.mark.parametrize("name", ["awq", "gptq", "deepseek", "int4"])
@pytest.mark.parametrize("left_out", [["nothing.like.it"], ["up_proj", "model.layers.0", "re:.*"]])
def test_linears_are_quantized_that_have_such_tensors(tmp_path, name, left_out):
    """Whatever config.json names: none of those that are floats, or ones that are not."""
    config = LLAMA | {"tie_word_embeddings": False, "hidden_size": 128, "intermediate_size": 128}
    case = CASES[name]
    floats = random_tensors(config)
    tensors, _ = quantized(floats, case)
    tensors = {n: np.ascontiguousarray(t) for n, t in tensors.items() if "k_proj" not in n}
    tensors |= {n: t for n, t in floats.items() if "k_proj" in n}
    field = "ignore" if "ignore" in case.config else "modules_to_not_convert"
    quantization = {**case.config, field: left_out if field != "ignore" else ["lm_head"]}
    settled_config, _ = settled(tmp_path, config | {"quantization_config": quantization}, tensors)
    model = AbstractModel.from_config(settled_config, "float32")
    linears = {n.removesuffix(".weight") for n, spec in model.params.items() if spec.stored}
    plain = {n.removesuffix(".weight") for n, t in tensors.items() if n.endswith("weight") and t.dtype == np.float32}
    assert any("k_proj" in module for module in plain)
    assert not linears & plain
    assert "model.layers.0.mlp.up_proj" in linears
    quantization = {**case.config, field: ["re:.*k_proj" if field == "ignore" else "k_proj", "lm_head"]}
    right, _ = settled(tmp_path, config | {"quantization_config": quantization}, tensors)
    assert right == config | {"quantization_config": quantization}  # what is right stays as it was


@pytest.mark.parametrize("storage", [np.uint8, ml_dtypes.bfloat16, np.float32])
def test_what_bitsandbytes_says_beside_the_weights(tmp_path, storage):
    """Kind and block size; values are bytes of floats, too; and which linears are quantized."""
    config = LLAMA | {"tie_word_embeddings": False, "hidden_size": 128, "intermediate_size": 128}
    floats = random_tensors(config)
    tensors, _ = quantized(floats, CASES["nf4 of 128"])
    tensors = {n: np.ascontiguousarray(t) for n, t in tensors.items() if "k_proj" not in n}
    tensors = {
        n: t.reshape(-1).view(storage)[:, None] if t.dtype == np.uint8 and t.ndim == 2 else t
        for n, t in tensors.items()
    }
    tensors |= {n: t for n, t in floats.items() if "k_proj" in n}
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
    settled_config, params = settled(tmp_path, config | {"quantization_config": quantization}, tensors)
    model = AbstractModel.from_config(settled_config, "float32")
    assert {scheme.name for scheme in model.quantized.values()} == {"nf4-g128"}
    plain = {
        name.split(".")[-2] for name, spec in model.params.items() if spec.is_embedding is False and not spec.stored
    }
    assert plain == {"k_proj", "lm_head"}
    _, expected = settled(tmp_path, config | {"quantization_config": CASES["nf4 of 128"].config}, tensors)
    assert all(np.array_equal(np.asarray(params[name]), np.asarray(array)) for name, array in expected.items())


def test_linears_of_mlx_are_those_that_have_scales(tmp_path):
    """Tables, too; and modules may be called as they are in the file."""
    text = LLAMA | {"model_type": "mistral", "tie_word_embeddings": False, "hidden_size": 64, "num_key_value_heads": 4}
    config = {"model_type": "mistral3", "text_config": text, "tie_word_embeddings": False}
    floats, more = random_tensors(config), CASES["mlx 8"]
    tensors, left = quantized(floats, CASES["mlx 4"])
    linear = "model.language_model.layers.0.mlp.up_proj."
    stored, left[linear + "weight"] = more.store(floats[linear + "weight"])
    tensors |= {linear + suffix: tensor for suffix, tensor in stored.items()}
    plain = "model.language_model.layers.0.self_attn.k_proj."
    tensors = {n: np.ascontiguousarray(t) for n, t in tensors.items() if not n.startswith(plain)}
    tensors[plain + "weight"] = floats[plain + "weight"]
    tensors = {n.replace("model.language_model.", "language_model.model."): t for n, t in tensors.items()}
    own = {"language_model.model.layers.0.mlp.up_proj": more.config}
    settled_config, params = settled(tmp_path, config | {"quantization": CASES["mlx 4"].config | own}, tensors)
    model = AbstractModel.from_config(settled_config, "float32")
    schemes = {name.removeprefix("model."): scheme.name for name, scheme in model.quantized.items()}
    assert schemes["embed_tokens.weight"] == schemes["layers.0.mlp.gate_proj.weight"] == "int4-g64-biases"
    assert schemes["layers.0.mlp.up_proj.weight"] == "int8-g64-biases"
    assert "layers.0.self_attn.k_proj.weight" not in schemes
    np.testing.assert_array_equal(
        np.asarray(params["model.layers.0.self_attn.k_proj.weight"]), floats[plain + "weight"]
    )
    assert params["lm_head.weight"].dtype == np.uint8
