"""How checkpoints have experts: one by one, stacked in one tensor or in three, quantized or not."""

import re

import jax
import numpy as np
import pytest

from jaxinfer.checkpoint.folder import Checkpoint
from jaxinfer.checkpoint.load import load_params
from jaxinfer.checkpoint.settle import as_stored
from jaxinfer.models.model import AbstractModel
from tests.checkpoint.formats import CASES
from tests.checkpoint.test_packed import forward
from tests.models.families import variants
from tests.plain import random_tensors, write_checkpoint

APART = (
    "hunyuan_v1_moe",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "glm4_moe",
    "dots1",
    "minimax_m2",
    "ernie4_5_moe",
    "phimoe",
)
EXPERT = re.compile(r"(.+?)experts\.(\d+)\.(\w+)\.weight")
KINDS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def config_of(name):
    return variants()[name].fields | {"model_type": name, "hidden_size": 64, "num_attention_heads": 4, "head_dim": 16}


def stacks(tensors):
    """All but the experts, and those stacked, by what comes before "experts." and by kind."""
    found, rest = {}, {}
    for name, tensor in tensors.items():
        if match := EXPERT.fullmatch(name):
            block, number, kind = match.groups()
            found.setdefault(block, {}).setdefault(KINDS.get(kind, kind), {})[int(number)] = tensor
        else:
            rest[name] = tensor
    assert found
    return rest, {
        block: {kind: np.stack([each[i] for i in range(len(each))]) for kind, each in kinds.items()}
        for block, kinds in found.items()
    }


def packed(tensors):
    """As transformers 5 has them in memory: under the names of its modules."""
    rest, experts = stacks(tensors)
    for block, kinds in experts.items():
        block = block.replace("block_sparse_moe", "mlp")
        rest[f"{block}experts.gate_up_proj"] = np.concatenate([kinds["gate_proj"], kinds["up_proj"]], axis=1)
        rest[f"{block}experts.down_proj"] = kinds["down_proj"]
    return {name.replace("block_sparse_moe.gate", "mlp.gate"): tensor for name, tensor in rest.items()}


def of_mlx(tensors):
    rest, experts = stacks(tensors)
    more = {
        f"{block}switch_mlp.{kind}.weight": stack for block, kinds in experts.items() for kind, stack in kinds.items()
    }
    return rest | more


def loaded(folder, config):
    with Checkpoint(folder) as checkpoint:
        model = AbstractModel.from_config(as_stored(config, checkpoint), "float32")
        return model, load_params(model, checkpoint, jax.devices()[0])


@pytest.mark.parametrize("spelling", [packed, of_mlx])
@pytest.mark.parametrize("name", APART)
def test_stacked(tmp_path, name, spelling):
    config = config_of(name)
    tensors = random_tensors(config)
    _, expected = loaded(write_checkpoint(tmp_path / "apart", config, tensors), config)
    respelled = spelling(tensors)
    assert not any(EXPERT.fullmatch(name) for name in respelled)
    _, found = loaded(write_checkpoint(tmp_path / "stacked", config, respelled), config)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_quantized_by_mlx(tmp_path, name):
    """All matrices, the routers too, which become floats again."""
    config, case = (
        config_of(name) | {"num_experts_per_tok": 2, "moe_intermediate_size": 64, "intermediate_size": 64},
        CASES["mlx 4"],
    )
    stored, left = {}, {}
    for tensor, values in of_mlx(random_tensors(config)).items():
        if values.ndim < 2:
            stored[tensor] = left[tensor] = values
            continue
        each = [case.store(matrix) for matrix in values.reshape(-1, *values.shape[-2:])]
        left[tensor] = np.stack([weight for _, weight in each]).reshape(values.shape)
        for suffix in each[0][0]:
            stack = np.stack([parts[suffix] for parts, _ in each])
            stored[tensor.removesuffix("weight") + suffix] = stack if values.ndim > 2 else stack[0]
    expected = forward(*loaded(write_checkpoint(tmp_path / "floats", config, left), config))
    quantized = config | {"quantization": case.config.get("quantization", case.config)}
    model, params = loaded(write_checkpoint(tmp_path / "mlx", quantized, stored), quantized)
    np.testing.assert_allclose(forward(model, params), expected, rtol=1e-4, atol=1e-4)
    experts = [name for name in model.params if ".experts." in name]
    assert experts
    assert set(experts) <= set(model.quantized)
    assert not any(".gate.weight" in name for name in model.quantized)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t.pop("model.layers.1.mlp.experts.2.up_proj.weight"), r"missing .*layers\.1\.mlp\.experts\.2\.up_p"),
        (
            lambda t: t.update(packed(t)),
            r"unknown tensors: .*layers\.0\.mlp\.experts\.down_proj, .*layers\.0\.mlp\.experts\.gate_up_proj",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.experts.8.up_proj.weight": t["lm_head.weight"]}),
            r"unknown tensors: model\.layers\.0\.mlp\.experts\.8\.up_proj\.weight",
        ),
        (
            lambda t: t.update(
                {"layers.0.mlp.experts.3.up_proj.weight": t["model.layers.0.mlp.experts.3.up_proj.weight"]}
            ),
            r"stored twice: model\.layers\.0\.mlp\.experts\.3\.up_proj\.weight",
        ),
    ],
)
def test_missing_and_twice(tmp_path, change, problem):
    config = config_of("qwen3_moe")
    tensors = random_tensors(config)
    change(tensors)
    with pytest.raises(ValueError, match=problem):
        loaded(write_checkpoint(tmp_path / "a", config, tensors), config)


def test_a_stack_without_its_half(tmp_path):
    config = config_of("qwen3_moe")
    tensors = packed(random_tensors(config))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors[name] = tensors[name][:, 1:]
    with pytest.raises(
        ValueError, match=r"wrong shapes: model\.layers\.0\.mlp\.experts\.gate_up_proj \[8, 47, 64\] in"
    ):
        loaded(write_checkpoint(tmp_path / "a", config, tensors), config)
