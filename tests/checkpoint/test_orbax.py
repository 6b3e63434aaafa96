"""Converted checkpoints: the same bits on any mesh, one line for what is damaged."""

import json
import math
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxinfer.checkpoint.folder import Checkpoint
from jaxinfer.checkpoint.load import load_params
from jaxinfer.checkpoint.orbax import MANIFEST, WEIGHTS, Converted, manifest, restore, save
from jaxinfer.models.model import AbstractModel
from jaxinfer.sharding import make_mesh
from tests.checkpoint.test_load import LLAMA, tensors

CONFIG = LLAMA | {"vocab_size": 41, "intermediate_size": 22}  # which four devices don't divide
PLACES = {"one": None, "fsdp=2,tensor=4": None, "data=2,tensor=2": None}


def mesh_or_device(spec):
    return jax.devices()[0] if spec == "one" else make_mesh(spec, jax.devices(), 4, 2, 16)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    from safetensors.numpy import save_file

    folder = tmp_path_factory.mktemp("source")
    save_file(tensors(CONFIG), folder / "model.safetensors")
    return folder


def loaded(source, model, where):
    with Checkpoint(source) as checkpoint:
        return load_params(model, checkpoint, mesh_or_device(where))


def write(folder: Path, params) -> Converted:
    save(params, str(folder / WEIGHTS))
    (folder / MANIFEST).write_bytes(manifest(params, str(folder / WEIGHTS)))
    return Converted(folder)


@pytest.mark.parametrize(
    ("scheme", "before", "after"),
    [
        ("int8", "fsdp=2,tensor=4", "data=2,tensor=2"),
        ("fp8", "one", "fsdp=2,tensor=4"),
        pytest.param(None, "fsdp=2,tensor=4", "one", marks=pytest.mark.slow),
        pytest.param("int8", "one", "one", marks=pytest.mark.slow),
    ],
)
def test_on_another_mesh(source, tmp_path, scheme, before, after):
    model = AbstractModel.from_config(CONFIG, "float32", scheme)
    got = restore(model, write(tmp_path, loaded(source, model, before)), mesh_or_device(after))
    expected = loaded(source, model, after)
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert (got[name].dtype, got[name].sharding) == (array.dtype, array.sharding)
        assert np.asarray(got[name]).tobytes() == np.asarray(array).tobytes(), name


def test_in_another_dtype(source, tmp_path):
    """What is quantized stays as it is, and all else is rounded."""
    model = AbstractModel.from_config(CONFIG, "float32", "int8")
    narrow = AbstractModel.from_config(CONFIG, "bfloat16", "int8")
    got = restore(narrow, write(tmp_path, loaded(source, model, "one")), mesh_or_device("one"))
    for name, array in loaded(source, narrow, "one").items():
        assert got[name].dtype == array.dtype
        assert np.asarray(got[name]).tobytes() == np.asarray(array).tobytes(), name


@pytest.mark.parametrize(
    "elsewhere",
    [
        "{other}",
        "../other/weights",
        "memory://other",
        "http://127.0.0.1:9/x",
        "reference::data:application/json,{}",
        None,
    ],
)
def test_a_manifest_does_not_say_where_weights_are(source, tmp_path, elsewhere):
    """Or whoever made a checkpoint could have others opened."""
    params = loaded(source, AbstractModel.from_config(CONFIG, "float32", "int8"), "one")
    (tmp_path / "other").mkdir()
    (tmp_path / "mine").mkdir()
    write(tmp_path / "other", params)
    fields = json.loads((tmp_path / "other" / MANIFEST).read_text())
    if elsewhere is not None:
        elsewhere = elsewhere.replace("{other}", str(tmp_path / "other" / WEIGHTS))
    (tmp_path / "mine" / MANIFEST).write_text(json.dumps(fields | {"weights": elsewhere}))
    with pytest.raises(ValueError, match=r"jaxinfer\.json: says that weights are .*; they are in weights/ beside it"):
        Converted(tmp_path / "mine")


def test_weights_that_are_links(source, tmp_path):
    """All of them to another checkpoint's, or one file."""
    model = AbstractModel.from_config(CONFIG, "float32", "int8")
    other, mine = tmp_path / "other", tmp_path / "mine"
    other.mkdir()
    write(other, loaded(source, model, "one"))
    shutil.copytree(other, mine)
    file = next(file for file in sorted((mine / WEIGHTS).rglob("*")) if file.is_file())
    file.unlink()
    file.symlink_to(other / WEIGHTS / file.relative_to(mine / WEIGHTS))
    with pytest.raises(ValueError, match="is a link that leads out of its folder"):
        restore(model, Converted(mine), mesh_or_device("one"))
    shutil.rmtree(mine / WEIGHTS)
    (mine / WEIGHTS).symlink_to(other / WEIGHTS)
    with pytest.raises(ValueError, match="is a link that leads out of its folder"):
        Converted(mine)


def test_damaged(source, tmp_path):
    """Each file cut in half, and taken away."""
    model = AbstractModel.from_config(CONFIG, "float32", "int8")
    write(tmp_path, loaded(source, model, "one"))
    weights = tmp_path / WEIGHTS
    files = sorted(file for file in weights.rglob("*") if file.is_file())
    assert len(files) > 8
    for file in files:
        content = file.read_bytes()
        for left in (content[: len(content) // 2], None):
            file.unlink()
            if left is not None:
                file.write_bytes(left)
            with pytest.raises(ValueError) as error:
                restore(model, Converted(tmp_path), mesh_or_device("one"))
            problem = f"damaged or cut off: files that are missing or have another size: {file.relative_to(weights)}"
            assert f"{weights}: {problem};" in str(error.value)
            assert "\n" not in str(error.value)
        file.write_bytes(content)
    altered = weights / "_METADATA"
    altered.write_bytes(bytes(255 - byte for byte in altered.read_bytes()))
    with pytest.raises(ValueError, match="damaged or cut off"):
        restore(model, Converted(tmp_path), mesh_or_device("one"))
    shutil.rmtree(weights)
    with pytest.raises(ValueError, match="damaged or cut off"):
        restore(model, Converted(tmp_path), mesh_or_device("one"))


def test_of_another_model(source, tmp_path):
    model = AbstractModel.from_config(CONFIG, "float32", "int8")
    write(tmp_path, loaded(source, model, "one"))
    for changed, problem in (
        ({"num_hidden_layers": 3}, "missing tensors: model.layers.2"),
        ({"num_hidden_layers": 1}, "unknown tensors: model.layers.1"),
        ({"hidden_size": 32}, "wrong shapes: lm_head.weight"),
        ({"vocab_size": 43}, "wrong shapes"),
    ):
        with pytest.raises(ValueError, match=problem):
            restore(
                AbstractModel.from_config(CONFIG | changed, "float32", "int8"),
                Converted(tmp_path),
                mesh_or_device("one"),
            )
    with pytest.raises(ValueError, match="wrong dtypes"):
        restore(AbstractModel.from_config(CONFIG, "float32", "fp8"), Converted(tmp_path), mesh_or_device("one"))
    fields = json.loads((tmp_path / MANIFEST).read_text())
    for wrong in ({"format": 2}, {"files": {"a": None}}, {"tensors": []}, {"tensors": {"a": {"shape": ["x"]}}}):
        (tmp_path / MANIFEST).write_text(json.dumps(fields | wrong))
        with pytest.raises(ValueError, match=f"{tmp_path / MANIFEST}.*convert") as error:
            Converted(tmp_path)
        assert "\n" not in str(error.value)


def test_sizes_that_can_not_be(tmp_path):
    for value in (-1, 1.5, True, "8", None, [], {}, 2**63, 10**400, math.nan, math.inf):
        for fields in (
            {"files": {"a": value}, "tensors": {}},
            {"files": {}, "tensors": {"a": {"shape": [2, value], "dtype": "float32"}}},
            {"files": {}, "tensors": {"a": {"shape": value, "dtype": "float32"}}},
            {"files": {}, "tensors": {"a": {"shape": [2**40, 2**40], "dtype": "float32"}}},
            {"files": {}, "tensors": {"a": {"shape": [2], "dtype": value}}},
            {"files": {}, "tensors": {"a": {"shape": [2], "dtype": "V9999999999"}}},
        ):
            if fields != {"files": {}, "tensors": {"a": {"shape": [], "dtype": "float32"}}}:
                (tmp_path / MANIFEST).write_text(json.dumps({"format": 1, **fields}))
                with pytest.raises(
                    ValueError, match=f"{tmp_path / MANIFEST}: not what jaxinfer convert writes"
                ) as error:
                    Converted(tmp_path)
                assert "\n" not in str(error.value)
