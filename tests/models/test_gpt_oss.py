"""gpt-oss's own checkpoints: experts in mxfp4, as they are there."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxinfer.checkpoint.folder import Checkpoint
from jaxinfer.checkpoint.load import load_params
from jaxinfer.convert import convert
from jaxinfer.models.model import AbstractModel
from jaxinfer.sharding import make_mesh
from tests.checkpoint.test_packed import forward
from tests.plain import random_tensors, write_checkpoint

CONFIG = {
    "model_type": "gpt_oss",
    "architectures": ["GptOssForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 6,
    "experts_per_token": 3,
    "num_experts_per_tok": 3,
    "sliding_window": 4,
    "max_position_embeddings": 256,
    "rope_theta": 150000,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 8,
    },
}
MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}


def checkpoints(tmp_path):
    """One in mxfp4, and the floats that transformers makes of it."""
    integration = pytest.importorskip("transformers.integrations.mxfp4", reason="transformers reads it, too")
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(3)
    plain = random_tensors(CONFIG)
    packed = dict(plain)
    for name, tensor in plain.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            count, columns, rows = packed.pop(name).shape
            blocks = rng.integers(0, 256, (count, rows, columns // 32, 16)).astype(np.uint8)
            scales = rng.integers(120, 126, (count, rows, columns // 32)).astype(np.uint8)
            packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            floats = integration.convert_moe_packed_tensors(
                torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.float32
            )
            plain[name] = floats.numpy()
            assert plain[name].shape == tensor.shape
    stored = write_checkpoint(tmp_path / "mxfp4", CONFIG | {"quantization_config": MXFP4}, packed)
    return stored, write_checkpoint(tmp_path / "floats", CONFIG, plain)


def loaded(folder, mesh=None, **options):
    config = json.loads((folder / "config.json").read_text())
    model = AbstractModel.from_config(config, "float32", **options)
    with Checkpoint(folder) as checkpoint:
        return model, load_params(model, checkpoint, mesh or jax.devices()[0])


@pytest.mark.parametrize("mesh", [None, "tensor=2", "tensor=4"])
def test_stays_as_it_is(tmp_path, mesh):
    """The same logits as the floats that transformers makes of it, in 17 bits for four weights."""
    stored, plain = checkpoints(tmp_path)
    expected = forward(*loaded(plain))
    mesh = mesh and make_mesh(mesh, jax.devices(), 4, 2, 64)
    model, params = loaded(stored, mesh)
    np.testing.assert_allclose(forward(model, params, mesh)[:, : expected.shape[1]], expected, rtol=1e-4, atol=1e-4)
    experts = {name: spec for name, spec in model.params.items() if ".experts." in name and name.endswith("weight")}
    assert len(experts) == 6
    for name, spec in experts.items():
        assert spec.scheme.name == "mxfp4", name
        assert sum(array.nbytes for array in spec.arrays.values()) == np.prod(spec.shape) * 17 / 32
    assert not set(model.quantized) - set(experts)


def test_written_again(tmp_path):
    """To Orbax as it is, and to files of floats."""
    stored, plain = checkpoints(tmp_path)
    expected = forward(*loaded(plain))
    convert(stored, tmp_path / "orbax")
    from jaxinfer.checkpoint.open import load_weights, open_weights

    with open_weights(tmp_path / "orbax") as weights:
        model = AbstractModel.from_config(json.loads((tmp_path / "orbax/config.json").read_text()), "float32")
        params = load_weights(model, weights, jax.devices()[0])
    np.testing.assert_allclose(forward(model, params), expected, rtol=1e-4, atol=1e-4)
    assert "mxfp4" in model.precision


def test_what_no_other_format_has(tmp_path):
    """Said before anything is written."""
    config = CONFIG | {"num_hidden_layers": 1}
    folder = write_checkpoint(tmp_path / "floats", config, random_tensors(config))
    with pytest.raises(ValueError, match=r"format hf: .*\.weight is of experts that are stacked in .*orbax"):
        convert(folder, tmp_path / "hf", format="hf", quantization="int8")
    stored, _ = checkpoints(tmp_path / "a")
    with pytest.raises(ValueError, match="quantization is 'int8': the checkpoint is quantized already"):
        loaded(stored, quantization="int8")
    assert not (tmp_path / "hf").exists()


def test_as_mlx_has_it(tmp_path):
    """Gates, ups and downs apart."""
    _, plain = checkpoints(tmp_path)
    expected = forward(*loaded(plain))
    tensors = load_file(plain / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name]:
        tensor, stem = tensors.pop(name), name.partition("experts.")[0] + "experts."
        kind = "bias" if name.endswith("_bias") else "weight"
        matrix = tensor if kind == "bias" else np.swapaxes(tensor, 1, 2)
        if "gate_up" in name:
            tensors |= {f"{stem}gate_proj.{kind}": matrix[:, ::2], f"{stem}up_proj.{kind}": matrix[:, 1::2]}
        else:
            tensors[f"{stem}down_proj.{kind}"] = matrix
    folder = write_checkpoint(tmp_path / "apart", CONFIG, tensors)
    np.testing.assert_array_equal(forward(*loaded(folder)), expected)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"gate_up_proj_scales": None}, r"missing tensors: model\.layers\.0\.mlp\.experts\.gate_up_proj_scales"),
        ({"down_proj_blocks": None}, r"missing tensors: model\.layers\.0\.mlp\.experts\.down_proj_blocks"),
        ({"gate_up_proj_scales": lambda x: x[:, :, 1:]}, r"_scales \[6, 192, 1\] instead of \[6, 192, 2\]"),
        ({"gate_up_proj_blocks": lambda x: x.astype(np.int32)}, r"gate_up_proj_blocks is int32 instead of uint8"),
        ({"down_proj_scales": lambda x: x | 255}, r"down_proj has scales of 255|has scales of 255, which is no number"),
        ({"down_proj_blocks": lambda x: x[1:]}, r"down_proj_blocks \[5, 64, 3, 16\] instead of \[6, 64, 3, 16\]"),
    ],
)
def test_what_is_wrong(tmp_path, change, problem):
    stored, _ = checkpoints(tmp_path)
    tensors = load_file(stored / "model.safetensors")
    for part, call in change.items():
        name = f"model.layers.0.mlp.experts.{part}"
        tensor = tensors.pop(name)
        if call is not None:
            tensors[name] = np.ascontiguousarray(call(tensor))
    save_file(tensors, stored / "model.safetensors")
    with pytest.raises(ValueError, match=problem):
        loaded(stored)


def test_whole_models():
    """gpt-oss-20b: expert tensors at most 0.27 of bfloat16, all of them 0.34."""
    config = CONFIG | {
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "max_position_embeddings": 131072,
    }
    packed, plain = (
        AbstractModel.from_config(config | more, "bfloat16") for more in ({"quantization_config": MXFP4}, {})
    )

    def experts(model):
        names = [name for name in model.arrays if ".experts." in name]
        return sum(model.params[model.arrays[n][0].name].arrays[model.arrays[n][1]].nbytes for n in names)

    assert experts(packed) / experts(plain) < 0.27
    assert packed.nbytes / plain.nbytes < 0.34
    assert plain.nbytes / 2 == pytest.approx(20.9e9, rel=0.01)
