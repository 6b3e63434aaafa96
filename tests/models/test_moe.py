"""Layers that predict more than the next token, behind the others."""

import jax
import pytest

from jaxinfer.checkpoint.folder import Checkpoint
from jaxinfer.checkpoint.load import load_params
from jaxinfer.models.model import AbstractModel
from tests.models.families import variants
from tests.plain import random_tensors, write_checkpoint


@pytest.mark.parametrize(("name", "field", "left"), [("glm4_moe", {}, 1), ("glm4_moe", {"num_mtp_layers": 2}, 2)])
def test_left_aside(tmp_path, name, field, left):
    check(tmp_path, name, field, left)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "dots1"])
def test_of_a_family_without_them(tmp_path, name):
    """A layer more than config.json says is an error, as elsewhere."""
    check(tmp_path, name, {}, 0)


def check(tmp_path, name, field, left):
    config = variants()[name].fields | field | {"model_type": name}
    tensors = random_tensors(config)
    last = {n: t for n, t in tensors.items() if n.startswith(f"model.layers.{config['num_hidden_layers'] - 1}.")}
    for more in range(left + 1):
        beyond = config["num_hidden_layers"] + more
        tensors |= {n.replace(f".{config['num_hidden_layers'] - 1}.", f".{beyond}.", 1): t for n, t in last.items()}
        folder = write_checkpoint(tmp_path / str(more), config, tensors)
        with Checkpoint(folder) as checkpoint:
            model = AbstractModel.from_config(config, "float32")
            if more < left:
                assert load_params(model, checkpoint, jax.devices()[0]).keys() == model.abstract.keys()
            else:
                with pytest.raises(ValueError, match=rf"unknown tensors: model\.layers\.{beyond}\."):
                    load_params(model, checkpoint, jax.devices()[0])
