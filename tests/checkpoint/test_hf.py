"""Hugging Face directories that are written: their files, their names, and what others read in them."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxinfer.checkpoint.folder import Checkpoint
from jaxinfer.checkpoint.hf import HfWriter, packed
from jaxinfer.checkpoint.load import load_params
from jaxinfer.checkpoint.write import Layout, SafetensorsWriter
from jaxinfer.convert import convert
from jaxinfer.models.model import AbstractModel
from jaxinfer.sharding import make_mesh
from tests.checkpoint.test_load import GPT2, LLAMA, tensors
from tests.models.test_families import reference


def test_files(tmp_path):
    """As many as needed, with an index, of tensors in any order; others read the same."""
    rng = np.random.default_rng(0)
    arrays = {f"t{i}": rng.integers(0, 100, (i, 3)).astype(ml_dtypes.bfloat16) for i in range(6)}
    with SafetensorsWriter(
        str(tmp_path), {name: Layout(a.shape, a.dtype) for name, a in arrays.items()}, file_bytes=40
    ) as writer:
        for name in reversed(arrays):
            writer.write(name, arrays[name])
    assert len(list(tmp_path.glob("model-0000*-of-00003.safetensors"))) == 3
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.nbytes == sum(array.nbytes for array in arrays.values())
        for name, array in arrays.items():
            assert np.array_equal(checkpoint.read(name), array)
    theirs = {key: value for file in tmp_path.glob("*.safetensors") for key, value in load_file(file).items()}
    assert all(np.array_equal(theirs[name], array) for name, array in arrays.items())
    with (
        pytest.raises(AssertionError, match="not written"),
        SafetensorsWriter(str(tmp_path), {"a": writer.layouts["t1"]}),
    ):
        pass


@pytest.mark.parametrize(
    ("config", "mesh"), [(GPT2, "one"), (LLAMA | {"vocab_size": 41, "tie_word_embeddings": True}, "tensor=4")]
)
def test_plain(tmp_path, config, mesh):
    """Fused and transposed tensors as they were, and no padding."""
    before = tensors(config)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    save_file(before, tmp_path / "a" / "model.safetensors")
    model = AbstractModel.from_config(config, "float32")
    mesh_or_device = jax.devices()[0] if mesh == "one" else make_mesh(mesh, jax.devices(), 4, 2, 16)
    with Checkpoint(tmp_path / "a") as checkpoint, HfWriter(model, str(tmp_path / "b")) as writer:
        writer.add(load_params(model, checkpoint, mesh_or_device))
    after = load_file(tmp_path / "b" / "model.safetensors")
    assert after.keys() == before.keys()
    assert all(np.array_equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(("scheme", "kind"), [("int8", "pack"), ("int8-w8a8", "int"), ("fp8", "float")])
def test_quantized(tmp_path, checkpoints, scheme, kind):
    """The names of compressed-tensors, and values that stand for the same weights."""
    source = checkpoints("llama-sharded-mha-tied").folder
    convert(source, tmp_path / "new", format="hf", quantization=scheme, show_progress=False)
    config = json.loads((tmp_path / "new" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", f"{kind}-quantized")
    assert config["ignore"] == ["lm_head"]
    group = config["config_groups"]["group_0"]
    assert group["weights"]["type"] == ("float" if scheme == "fp8" else "int")
    assert (group["input_activations"] is None) == (scheme != "int8-w8a8")
    model = AbstractModel.from_config(json.loads((source / "config.json").read_text()), "float32", scheme)
    with Checkpoint(source) as checkpoint:
        params = load_params(model, checkpoint, jax.devices()[0])
    with Checkpoint(tmp_path / "new") as checkpoint:
        stored = {key: checkpoint.read(key) for key in checkpoint.tensors}
    name = "model.layers.1.mlp.down_proj.weight"
    values = np.asarray(params[name])
    if kind == "pack":
        assert stored[f"{name}_shape"].tolist() == list(values.shape)
        unsigned = stored[f"{name}_packed"].view(np.uint8)[:, : values.shape[1]]
        assert np.array_equal(unsigned.astype(np.int16) - 128, values)
        assert name not in stored
    else:
        assert np.array_equal(stored[name], values)
    assert np.array_equal(stored[f"{name}_scale"], params[f"{name}_scale"])


def test_packing():
    values = np.arange(-8, 8, dtype=np.int8).reshape(2, 8)[:, :7]
    assert packed(values, 4).view(np.uint32).tolist() == [[0x06543210], [0x0EDCBA98]]
    assert packed(values, 8).view(np.uint8).tolist() == [[*range(120, 127), 0], [*range(128, 135), 0]]


def test_what_has_no_form(tmp_path, checkpoints):
    for name, quantization, problem in (
        ("gpt2", "int8", "compressed-tensors has no form for: use format orbax"),
        ("llama", {"*": "int8"}, "model.embed_tokens.weight is a table"),
    ):
        with pytest.raises(ValueError, match=problem):
            convert(checkpoints(name).folder, tmp_path / "x", format="hf", quantization=quantization)
    with pytest.raises(ValueError, match="is written into a folder here"):
        convert(checkpoints("llama").folder, "memory://x", format="hf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_transformers_computes_the_same(tmp_path, checkpoints, name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    reference = checkpoints(name)
    convert(reference.folder, tmp_path / "new", format="hf", show_progress=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    with torch.no_grad():
        logits = model(torch.tensor([reference.prompts[-1]])).logits[0].numpy()
    np.testing.assert_allclose(logits, reference.logits, atol=1e-5)


@pytest.mark.slow
def test_transformers_reads_what_is_quantized_inside_of_a_wrapper(tmp_path, checkpoints):
    """The tower, which is not written, is not said to be quantized."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    found = reference(checkpoints.root, "gemma3", "small")
    convert(found.folder, tmp_path / "new", format="hf", quantization="int8", show_progress=False)
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "new")
    with torch.no_grad():
        logits = model(torch.tensor([found.tokens])).logits[0].numpy()
    assert 0 < np.abs(logits - found.logits).max() < 0.1 * np.abs(found.logits).max()
