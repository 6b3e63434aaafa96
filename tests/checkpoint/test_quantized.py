"""Checkpoints that are quantized already, in the formats of the hub, against what they stand for."""

import copy
import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxinfer import LLM
from jaxinfer.checkpoint.folder import Checkpoint
from jaxinfer.checkpoint.hf import HfWriter, config_of
from jaxinfer.checkpoint.load import load_params
from jaxinfer.checkpoint.quantized import decode, wanted_tensors
from jaxinfer.models.model import AbstractModel
from jaxinfer.quantization.stored import stored_quantization
from jaxinfer.sharding import make_mesh
from tests.checkpoint import formats
from tests.checkpoint.formats import CASES, TOKEN, quantized
from tests.plain import CONFIG, random_tensors, write_checkpoint
from tests.quantization.test_qarray import real

SMALL = CONFIG | {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "num_hidden_layers": 1}
ARCHITECTURES = {
    "llama": SMALL,
    "qwen3": SMALL | {"model_type": "qwen3"},
    "qwen2": SMALL | {"model_type": "qwen2", "tie_word_embeddings": True},
    "phi3": SMALL | {"model_type": "phi3"},
    "gpt2": {"model_type": "gpt2", "vocab_size": 300, "n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 64},
}


def loaded(folder, config, stored, mesh=None, **options):
    folder.mkdir(exist_ok=True)
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in stored.items()}, folder / "model.safetensors")
    model = AbstractModel.from_config(config, "float32", **options)
    with Checkpoint(folder) as checkpoint:
        return model, load_params(model, checkpoint, mesh or jax.devices()[0])


def check(config, case, tmp_path, mesh=None):
    stored, left = quantized(random_tensors(config), case)
    model, params = loaded(tmp_path / "a", config | {"quantization_config": case.config}, stored, mesh)
    plain, expected = loaded(tmp_path / "b", config, left, mesh)
    for name, weight in expected.items():
        got = params[name]
        if name in model.quantized:
            zeros, biases = (np.asarray(params.get(name + suffix, 0), np.float32) for suffix in ("_zero", "_bias"))
            got = real(got, params[f"{name}_scale"], model.quantized[name], zeros, biases)
        got, weight = (np.asarray(array)[tuple(map(slice, plain.abstract[name].shape))] for array in (got, weight))
        np.testing.assert_allclose(got, weight, rtol=1e-6, atol=1e-7, err_msg=name)
    return model


@pytest.mark.parametrize("name", CASES)
def test_what_they_stand_for(name, tmp_path):
    case, config = CASES[name], SMALL | {"intermediate_size": 128, "hidden_size": 128, "head_dim": 64}
    model = check(config, case, tmp_path)
    linear = "model.layers.0.mlp.up_proj.weight"
    assert model.params[linear].stored is not None
    assert (model.params["lm_head.weight"].stored is None) == (not name.startswith("mlx"))
    kept = model.quantized.get(linear)
    assert (kept and kept.name) == case.scheme


@pytest.mark.parametrize(
    ("architecture", "name", "mesh"),
    [
        ("qwen2", "awq", "fsdp=2,tensor=2"),
        ("qwen3", "int4", "fsdp=2,tensor=2"),
        ("qwen3", "gptq in another order", "data=2,tensor=4"),
        ("qwen2", "gptq of 128", None),  # where a weight has fewer inputs, it is converted
        ("gpt2", "gptq", None),
        ("gpt2", "gptq with zero points", "tensor=2"),
        ("qwen3", "nf4", "tensor=2"),  # blocks of 64 go on from row to row of 96
        ("phi3", "fp4", "tensor=2"),
        ("phi3", "fp8 of whole tensors", "tensor=2"),  # a scale that its parts share
        ("phi3", "fp8 of tensors", None),
        ("qwen2", "mlx 2", "fsdp=2,tensor=2"),
        ("phi3", "mlx 3", "tensor=2"),  # down_proj is left in floats
    ],
)
def test_architectures_and_meshes(architecture, name, mesh, tmp_path):
    """Fused and transposed tensors, biases, padded weights."""
    config = ARCHITECTURES[architecture]
    device_mesh = mesh and make_mesh(mesh, jax.devices(), 4, 4 if architecture == "gpt2" else 2, 64)
    check(config, CASES[name], tmp_path, device_mesh)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("gptq with zero points", "fsdp=2,tensor=2"),
        ("deepseek", "tensor=2"),
        ("nf4", "fsdp=2,tensor=2"),
        ("mlx 4", "fsdp=2,tensor=2"),
    ],
)
def test_logits(name, mesh, tmp_path):
    """From end to end, beside the checkpoint of floats that they stand for."""
    case, prompts = CASES[name], [[5, 17, 200, 33], list(range(40, 100))]
    options = {"max_num_seqs": 2, "max_num_batched_tokens": 64, "page_size": 8, "max_model_len": 64}
    stored, left = quantized(random_tensors(CONFIG), case)
    scores = []
    for folder, config, tensors, spec in (
        ("a", {"quantization_config": case.config}, stored, mesh),
        ("b", {}, left, None),
    ):
        with LLM(write_checkpoint(tmp_path / folder, CONFIG | config, tensors), mesh=spec, **options) as llm:
            scores.append(llm.score(prompts))
    for score, other in zip(*scores, strict=True):
        np.testing.assert_allclose(score.logprobs, other.logprobs, atol=1e-4)


def changed(name, path, value):
    config = copy.deepcopy(CASES[name].config)
    *parents, last = path.split(".")
    inner = config
    for parent in parents:
        inner = inner[parent]
    inner[last] = value
    return config


WEIGHTS, INPUTS = "config_groups.group_0.weights", "config_groups.group_0.input_activations"


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("awq", "quant_method", "quark"),
        ("nf4", "load_in_4bit", False),
        ("nf4", "bnb_4bit_quant_type", "af4"),
        ("nf4", "bnb_4bit_blocksize", 48),
        ("mlx 4", "bits", 7),
        ("mlx 4", "group_size", 16),
        ("mlx 4", "mode", "nvfp4"),
        ("mlx mxfp4", "group_size", 64),
        ("mlx mxfp4", "bits", 8),
        ("awq", "version", "gemv"),
        ("awq", "bits", 3),
        ("gptq", "bits", 3),
        ("gptq", "group_size", "x"),
        ("gptq", "checkpoint_format", "marlin"),
        ("gptq", "dynamic", {"-:.*": {}}),
        ("deepseek", "fmt", "e5m2"),
        ("deepseek", "weight_block_size", [128]),
        ("deepseek", "modules_to_not_convert", "lm_head"),
        ("int4", "quantization_status", "frozen"),
        ("int4", "kv_cache_scheme", {"num_bits": 8}),
        ("int4", "config_groups", []),
        ("int4", "sparsity_config", {"format": "sparse-24"}),
        ("int4", "format", "marlin-24"),
        ("int4", f"{WEIGHTS}.num_bits", 2),
        ("int4", f"{WEIGHTS}.strategy", "block"),
        ("int4", f"{WEIGHTS}.group_size", 0),
        ("int8 w8a8", f"{INPUTS}.dynamic", False),
        ("int8 w8a8", f"{INPUTS}.strategy", "tensor"),
        ("int8 w8a8", "config_groups.group_0.output_activations", TOKEN),
    ],
)
def test_what_is_not_supported(name, path, value):
    field = "config_groups.group_0.format" if path == "format" else path
    with pytest.raises(ValueError, match=re.escape(f"config.json: quantization_config.{field} is {value!r}")) as error:
        AbstractModel.from_config(SMALL | {"quantization_config": changed(name, path, value)}, "float32")
    assert "original checkpoint" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "suffix", "value", "what"),
    [
        ("gptq", "scales", None, "missing tensors: model.layers.0.mlp.up_proj.scales"),
        ("gptq", "more", np.zeros(2), "unknown tensors: model.layers.0.mlp.up_proj.more"),
        ("gptq", "qweight", np.zeros((8, 95), np.int32), r"wrong shapes: .*qweight \[8, 95\] instead of \[8, 96\]"),
        ("gptq", "qzeros", np.zeros((2, 12), np.float32), "wrong dtypes .*qzeros is float32 instead of int32"),
        ("gptq", "qzeros", np.zeros((2, 12), np.int32), "up_proj: has zero points other than 8, and config.json says"),
        ("gptq", "g_idx", np.zeros(64, np.int32), "inputs that are not in the order of their groups"),
        ("gptq in another order", "g_idx", np.full(64, 2, np.int32), "has groups from 2 to 2 in g_idx, of 2"),
        ("int4", "weight_shape", np.array([96, 65]), r"has \[96, 65\] in weight_shape instead of \[96, 64\]"),
    ],
)
def test_damaged(name, suffix, value, what, tmp_path):
    stored, _ = quantized(random_tensors(SMALL), CASES[name])
    key = f"model.layers.0.mlp.up_proj.{suffix}"
    stored = {n: t for n, t in stored.items() if n != key} | ({} if value is None else {key: value})
    with pytest.raises(ValueError, match=what):
        loaded(tmp_path / "m", SMALL | {"quantization_config": CASES[name].config}, stored)


def test_a_quantization_beside_the_checkpoints_own(tmp_path):
    """The same is no contradiction."""
    config = SMALL | {"quantization_config": CASES["int8 w8a16"].config}
    same = {"*.k_proj.*": "none", "lm_head.*": "none", "model.layers.*": "int8"}
    assert (
        AbstractModel.from_config(config, "float32", same).quantized
        == AbstractModel.from_config(config, "float32").quantized
    )
    with pytest.raises(
        ValueError, match=r"quantized already \(compressed-tensors\), and .* is in floats: leave it out, or"
    ):
        AbstractModel.from_config(config, "float32", "int4")


def test_targets():
    """Names come before classes, and what is ignored before both."""
    config = copy.deepcopy(CASES["int4"].config)
    other = copy.deepcopy(CASES["int8 w8a16"].config["config_groups"]["group_0"])
    config["config_groups"]["group_1"] = other | {"targets": ["re:.*down_proj", "model.layers.0.self_attn.k_proj"]}
    config["ignore"] = ["model.layers.0.self_attn.k_proj", "lm_head"]
    model = AbstractModel.from_config(SMALL | {"quantization_config": config}, "float32")
    names = {name.split(".")[-2]: scheme.name for name, scheme in model.quantized.items()}
    assert names["down_proj"] == "int8"
    assert names["up_proj"] == names["o_proj"] == "int4"
    assert "k_proj" not in names


def test_plan(tmp_path, cli):
    """From config.json alone."""
    bytes_of = {}
    for name in ("gptq", "gptq in another order"):
        config = CONFIG | {"quantization_config": CASES[name].config}
        (tmp_path / "config.json").write_text(json.dumps(config))
        done = cli("plan", "--model", tmp_path, "--topology", "l4-1", "--json")
        assert done.code == 0, done.err
        bytes_of[name] = json.loads(done.out)["bytes"]["weights"]
    model = AbstractModel.from_config(config, "bfloat16")
    assert bytes_of["gptq in another order"] == sum(a.size * 2 for a in model.abstract.values())
    assert bytes_of["gptq"] < 0.55 * bytes_of["gptq in another order"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "bits", "kind", "strategy", "symmetric"),
    [
        ("pack-quantized", 4, "int", "group", True),
        ("pack-quantized", 4, "int", "group", False),
        ("pack-quantized", 8, "int", "channel", True),
        ("pack-quantized", 8, "int", "channel", False),
        ("naive-quantized", 8, "int", "channel", True),
        ("naive-quantized", 8, "float", "channel", True),
        ("naive-quantized", 8, "float", "tensor", True),
        ("naive-quantized", 8, "float", "block", True),
    ],
)
def test_by_the_package_itself(layout, bits, kind, strategy, symmetric):
    """What compressed-tensors writes, and what it reads in that."""
    pytest.importorskip("compressed_tensors")
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    more = {"group": {"group_size": 32}, "block": {"block_structure": [32, 32]}}.get(strategy, {})
    args = QuantizationArgs(num_bits=bits, type=kind, symmetric=symmetric, strategy=strategy, **more)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    torch.manual_seed(0)
    weight = torch.randn(48, 96)
    high, wide = {"group": (1, 32), "channel": (1, 96), "tensor": (48, 96), "block": (32, 32)}[strategy]
    whole = torch.nn.functional.pad(weight, (0, 0, 0, -48 % high)).reshape(-(-48 // high), high, 96 // wide, wide)
    scale, zero = calculate_qparams(whole.amin((1, 3)), whole.amax((1, 3)), args)
    compressor = BaseCompressor.load_from_registry(layout)
    compressor = compressor if isinstance(compressor, type) else type(compressor)
    parts = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    stored = compressor.compress(parts, scheme)
    expected = compressor.decompress(dict(stored), scheme)["weight"].float().numpy()
    config = {"quant_method": "compressed-tensors", "format": layout, "ignore": []}
    config |= {"config_groups": {"group_0": json.loads(scheme.model_dump_json())}}
    form = stored_quantization({"quantization_config": config}).format_of("model.layers.0.mlp.up_proj", "Linear")
    arrays = {
        name: tensor.view(torch.int8).numpy().view(formats.FP8)
        if tensor.dtype == torch.float8_e4m3fn
        else tensor.numpy()
        for name, tensor in stored.items()
    }
    wanted = wanted_tensors(form, 48, 96)
    assert {name for name, tensor in wanted.items() if not tensor.optional} <= arrays.keys() <= wanted.keys()
    for name, array in arrays.items():
        assert array.shape in wanted[name].shapes
        assert array.dtype in wanted[name].dtypes
    np.testing.assert_allclose(decode(form, arrays, 48, 96).floats(np.dtype(np.float32)), expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["gptq with zero points", "gptq 8 bits", "int4 of 128", "deepseek", "int8 w8a8"])
def test_written_again(name, tmp_path):
    """In the format of compressed-tensors, from which the same parameters come, to the bit."""
    config = CONFIG | {"quantization_config": CASES[name].config}
    model, params = loaded(tmp_path / "a", config, quantized(random_tensors(CONFIG), CASES[name])[0])
    (tmp_path / "b").mkdir()
    with HfWriter(model, str(tmp_path / "b")) as writer:
        writer.add(params)
    other = AbstractModel.from_config(config_of(model, config), "float32")
    assert {n: dataclasses.replace(s, name="") for n, s in other.quantized.items()} == {
        n: dataclasses.replace(s, name="") for n, s in model.quantized.items()
    }
    with Checkpoint(tmp_path / "b") as checkpoint:
        again = load_params(other, checkpoint, jax.devices()[0])
    assert again.keys() == params.keys()
    for key, array in params.items():
        np.testing.assert_array_equal(np.asarray(again[key]), np.asarray(array), err_msg=key)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("act", [False, True])
@pytest.mark.parametrize("size", [32, -1])
def test_zeros_in_the_middle_whichever_version_stored_them(bits, version, act, size):
    """`sym` says what they are, and writers disagree on the version."""
    case = formats.gptq(bits, size, act=act)
    stored, weight = case.store(np.random.default_rng(0).standard_normal((16, 64)).astype(np.float32))
    config = {**case.config, "checkpoint_format": version}
    form = stored_quantization({"quantization_config": config}).format_of("model.layers.0.mlp.up_proj", "Linear")
    groups, rows = stored["scales"].shape
    for zero in (2 ** (bits - 1), 2 ** (bits - 1) - 1):
        stored["qzeros"] = formats.words(np.full((groups, rows), zero), bits)
        decoded = decode(form, stored, 16, 64)
        np.testing.assert_allclose(decoded.floats(np.dtype(np.float32)), weight, rtol=1e-6)
    for zero in (0, 2 ** (bits - 1) + 1):
        stored["qzeros"] = formats.words(np.full((groups, rows), zero), bits)
        with pytest.raises(ValueError, match=f"zero points other than {2 ** (bits - 1)}"):
            decode(form, stored, 16, 64)


@pytest.mark.parametrize(
    ("name", "left_out", "plain", "kept"),
    [
        ("awq", "k_proj", "model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.q_proj"),
        ("awq", "layers.0.self", "model.layers.0.self_attn.k_proj", "model.layers.0.mlp.up_proj"),  # vLLM: anywhere
        ("deepseek", "model.layers.1", "model.layers.1.mlp.up_proj", "model.layers.2.mlp.up_proj"),
        (
            "deepseek",
            r"model\.layers\.\d+\.self_attn.*",
            "model.layers.7.self_attn.o_proj",
            "model.layers.7.mlp.up_proj",
        ),
        ("deepseek", r".*\.(gate|up)_proj", "model.layers.3.mlp.gate_proj", "model.layers.3.mlp.down_proj"),
        ("deepseek", "5.mlp.up_proj", "model.layers.5.mlp.up_proj", "model.layers.5.mlp.gate_proj"),  # the end of it
        ("deepseek", "*.up_proj", "lm_head", "model.layers.5.mlp.up_proj"),  # no regular expression, and no name
    ],
)
def test_names_of_what_is_not_converted(name, left_out, plain, kept):
    """As transformers reads them: a name, the end of one, or a regular expression for its beginning."""
    config = {**CASES[name].config, "modules_to_not_convert": [left_out]}
    format_of = stored_quantization({"quantization_config": config}).format_of
    assert format_of(plain, "Linear") is None
    assert format_of(kept, "Linear") is not None
