"""Layers that predict more than the next token, behind the others; and what config.json may not say of experts."""

import jax
import pytest

from jaxinfer.checkpoint.folder import Checkpoint
from jaxinfer.checkpoint.load import load_params
from jaxinfer.models.model import AbstractModel
from jaxinfer.models.registry import parse_config
from tests.models.families import phimoe, variants
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


@pytest.mark.parametrize(
    ("family", "fields", "named"),
    [
        ("hunyuan_v1_moe", {"moe_topk": [3]}, "moe_topk is .*: it must be an integer, or a list of 2"),
        ("hunyuan_v1_moe", {"moe_topk": [3, 0]}, r"moe_topk\[1\] is 0"),
        ("hunyuan_v1_moe", {"moe_topk": [1, 7]}, "moe_topk is .*: it must be at most num_experts, 6"),
        ("hunyuan_v1_moe", {"moe_intermediate_size": [48, 24]}, "moe_intermediate_size is .*: it must be 48 in all"),
        ("hunyuan_v1_moe", {"num_shared_expert": 2}, "num_shared_expert is 2: it must be 1 in all"),
        ("hunyuan_v1_moe", {"use_mixed_mlp_moe": False}, "use_mixed_mlp_moe is False"),
        ("hunyuan_v1_moe", {"moe_layer_num_skipped": 1}, "moe_layer_num_skipped is 1"),
        ("hunyuan_v1_moe", {"use_cla": True}, "use_cla is True"),
        ("phimoe", {"num_experts_per_tok": 3}, "num_experts_per_tok is 3"),
        ("phimoe", {"tie_word_embeddings": True}, "lm_head_bias is True"),
        ("phimoe", {"router_jitter_noise": -0.1}, "router_jitter_noise is -0.1"),
        ("phimoe", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ("phimoe", {"rope_parameters": phimoe.FACTORS | {"rope_type": "longrope"}}, "short_mscale is missing"),
        (
            "phimoe",
            {"rope_parameters": phimoe.FACTORS | {"rope_type": "longrope", "short_mscale": 1.0}},
            "long_mscale is missing",
        ),
    ],
)
def test_what_config_json_may_not_say(family, fields, named):
    good = variants()[family].fields | {"model_type": family}
    parse_config(good)
    with pytest.raises(ValueError, match=named):
        parse_config(good | fields)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("mixtral", "scoring_func", "sigmoid"),
        ("qwen3_moe", "scoring_func", "topk"),
        ("minimax_m2", "scoring_func", "softmax"),
        ("glm4_moe", "scoring_func", "softmax"),
        ("dots1", "topk_method", "group_limited_greedy"),
    ],
)
def test_a_router_of_another_kind(name, field, value):
    """Fields that transformers doesn't read, and code of the hub does."""
    data = variants()[name].fields | {"model_type": name}
    parse_config(data | {field: {"minimax_m2": "sigmoid", "dots1": "noaux_tc", "glm4_moe": "sigmoid"}.get(name)})
    with pytest.raises(ValueError, match=f"{field} is '{value}': jaxinfer supports only"):
        parse_config(data | {field: value})
