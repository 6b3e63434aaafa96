"""Text models inside of others, however config.json and tensors are spelt; test_families has their arithmetic."""

import json
from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxinfer import LLM, CheckpointError, SamplingParams
from jaxinfer.checkpoint.files import read_config
from jaxinfer.checkpoint.folder import Checkpoint
from jaxinfer.checkpoint.load import load_params
from jaxinfer.checkpoint.open import open_weights
from jaxinfer.checkpoint.settle import as_stored
from jaxinfer.convert import convert, stored_dtype
from jaxinfer.engine.deployment import read_deployment
from jaxinfer.engine.dtypes import choose_dtype
from jaxinfer.errors import UnsupportedError
from jaxinfer.models import mistral
from jaxinfer.models.model import AbstractModel
from jaxinfer.models.registry import REGISTRY, architecture, parse_config
from jaxinfer.models.wrapped import MISTRAL3
from jaxinfer.plan.slices import Device
from tests.checkpoints import same_tokens
from tests.models.test_families import PROMPT, TOKENS, reference
from tests.plain import CONFIG, random_tensors, write_checkpoint
from tests.refusals import line, refusal

TEXT = CONFIG | {"model_type": "mistral", "sliding_window": None}
WRAPPED = {
    "model_type": "mistral3",
    "architectures": ["Mistral3ForConditionalGeneration"],
    "vision_config": {"model_type": "pixtral", "hidden_size": 8},
    "text_config": TEXT,
    "tie_word_embeddings": False,
}
OPTIONS = {"max_num_seqs": 2, "max_num_batched_tokens": 32, "max_model_len": 64}
PARAMS = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
TOWER = {
    "vision_tower.patch_conv.weight": np.ones((4, 3, 2, 2), np.float32),
    "vision_tower.transformer.layers.0.attention.q_proj.weight": np.ones((64, 64), np.float32),
    "multi_modal_projector.linear_1.weight": np.ones((32, 64), np.float32),
}
# What a name of the text model begins with as modules have it, and in files.
HUB = {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."}


def spelt(tensors, beginnings=HUB):
    renamed = {}
    for name, tensor in tensors.items():
        old = next((b for b in beginnings if name.startswith(b)), "")
        renamed[beginnings.get(old, "") + name.removeprefix(old)] = tensor
    return renamed


def plain_names(tensors):
    return spelt(tensors, {"model.language_model.": "model."})


@pytest.fixture(scope="module")
def tensors():
    return random_tensors(WRAPPED)


def loaded(folder, config):
    with Checkpoint(folder) as checkpoint:
        config = as_stored(config, checkpoint)
        model = AbstractModel.from_config(config, "float32")
        before = checkpoint.bytes_read
        params = load_params(model, checkpoint, jax.devices()[0])
        return config, params, checkpoint.bytes_read - before


def stored(folder, tensors):
    folder.mkdir(exist_ok=True)
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("beginnings", [{}, HUB, {"model.language_model.": "language_model."}])
@pytest.mark.parametrize("inside", ["", "model."])
def test_only_the_text_model_is_read(tmp_path, tensors, beginnings, inside):
    tower = {inside + name: tensor for name, tensor in TOWER.items()}
    _, params, read = loaded(stored(tmp_path, spelt(tensors, beginnings) | tower), WRAPPED)
    assert read == sum(tensor.nbytes for tensor in tensors.values())
    for name, tensor in plain_names(tensors).items():
        np.testing.assert_array_equal(params[name], tensor)


@pytest.mark.parametrize("name", ["vision_model.x.weight", "my_vision_tower.x.weight", "language_model.model.x.weight"])
def test_what_nobody_knows_is_an_error(tmp_path, tensors, name):
    folder = stored(tmp_path, spelt(tensors) | TOWER | {name: np.ones((2, 2), np.float32)})
    assert line(lambda: loaded(folder, WRAPPED)).endswith(f"unknown tensors: {name}")


def test_what_is_missing_or_there_twice(tmp_path, tensors):
    hub = spelt(tensors)
    del hub["language_model.model.layers.1.mlp.up_proj.weight"]
    norm = "model.language_model.norm.weight"
    text = line(lambda: loaded(stored(tmp_path, hub | {norm: tensors[norm]}), WRAPPED))
    assert "missing tensors: model.language_model.layers.1.mlp.up_proj.weight;" in text
    assert f"stored twice: {norm} (also as language_model.model.norm.weight)" in text


@pytest.mark.parametrize(
    ("outer", "inner", "tied"),
    [(True, None, True), (None, True, True), (False, True, True), (False, None, False), (None, None, True)],
)
def test_tied(tmp_path, tensors, outer, inner, tied):
    """Also by default, unless there is a head of its own."""
    text = {name: value for name, value in TEXT.items() if name != "tie_word_embeddings"}
    config = {name: value for name, value in WRAPPED.items() if name != "tie_word_embeddings"}
    config |= {} if outer is None else {"tie_word_embeddings": outer}
    config["text_config"] = text | ({} if inner is None else {"tie_word_embeddings": inner})
    assert parse_config(config)[1].tie_word_embeddings is tied
    settled, params, _ = loaded(stored(tmp_path, spelt(tensors)), config)
    np.testing.assert_array_equal(params["lm_head.weight"], tensors["lm_head.weight"])
    assert not parse_config(settled)[1].tie_word_embeddings
    hub = spelt(tensors)
    embedding = hub["language_model.model.embed_tokens.weight"]
    for head in ({}, {"language_model.lm_head.weight": embedding}):
        rest = {name: tensor for name, tensor in hub.items() if "lm_head" not in name}
        if tied:
            assert "lm_head.weight" not in loaded(stored(tmp_path, rest | head), config)[1]
    if tied:  # saved with the head alone
        del hub["language_model.model.embed_tokens.weight"]
        params = loaded(stored(tmp_path, hub), config)[1]
        np.testing.assert_array_equal(params["model.embed_tokens.weight"], tensors["lm_head.weight"])


def test_which_text_model():
    assert architecture(WRAPPED).build is mistral.ARCHITECTURE.build
    assert architecture(WRAPPED | {"architectures": ["Mistral3Model"]}).build is mistral.ARCHITECTURE.build
    for config, problem in (
        (WRAPPED | {"text_config": TEXT | {"model_type": "bert"}}, "text_config: model_type is 'bert': supported"),
        (WRAPPED | {"text_config": TEXT | {"model_type": []}}, "text_config: model_type is []: supported"),
        (WRAPPED | {"text_config": None}, "text_config is None: it must be an object"),
        (WRAPPED | {"text_config": [1]}, "text_config is [1]: it must be an object"),
        (WRAPPED | {"architectures": ["Mistral3ForOthers"]}, "supported with model_type mistral3 are Mistral3ForCond"),
        (WRAPPED | {"tie_word_embeddings": 1}, "config.json: tie_word_embeddings is 1"),
        (WRAPPED | {"text_config": TEXT | {"hidden_size": 0}}, "config.json: text_config: hidden_size is 0"),
    ):
        assert problem in line(lambda config=config: parse_config(config), CheckpointError)


@pytest.mark.parametrize("name", [name for name in REGISTRY if name.endswith("ForConditionalGeneration")])
def test_every_wrapper_has_its_modules(name):
    """By all of its text models' names."""
    entry = REGISTRY[name]
    for kind in entry.source.texts:
        text = CONFIG | {"model_type": kind}
        text.pop("head_dim")
        _, config = parse_config({"model_type": entry.model_type, "architectures": [name], "text_config": text})
        assert config.hidden_size == CONFIG["hidden_size"]


def test_end_to_end(tmp_path, tensors, cli):
    """The same as the text model in a checkpoint of its own, also converted."""
    config = WRAPPED | {"text_config": TEXT | {"eos_token_id": 7, "dtype": "float32"}}
    folder = write_checkpoint(tmp_path / "model", config, spelt(tensors) | TOWER)
    tokens = {}
    for name, model in {
        "text": write_checkpoint(tmp_path / "text", TEXT, plain_names(tensors)),
        "wrapped": folder,
        "hf": tmp_path / "hf",
        "orbax": tmp_path / "orbax",
    }.items():
        if name in ("hf", "orbax"):
            convert(folder, model, format=name)
        with LLM(model, **OPTIONS) as llm:
            tokens[name] = llm.generate([[5, 6, 7], [9]], PARAMS, use_tqdm=False)
            if name == "wrapped":
                refuses_images(llm)
                assert llm.engine.eos_token_ids == (7,)
    assert len({str([output.outputs[0].token_ids for output in outputs]) for outputs in tokens.values()}) == 1
    assert "language_model.model.norm.weight" not in load_file(tmp_path / "hf" / "model.safetensors")
    assert cli("plan", folder, "--topology", "h100-1").out


@pytest.mark.parametrize(
    "name",
    [
        *("mistral3-in-the-model", "ministral3-window", "qwen2_vl-flat"),
        pytest.param("gemma2-window", marks=pytest.mark.slow),  # with a soft cap, too
    ],
)
def test_engines_against_transformers(checkpoints, name):
    """Through the cache, with pages that a window has left behind."""
    found = reference(checkpoints.root, name, "large", greedy=True)
    params = SamplingParams(max_tokens=TOKENS - PROMPT, temperature=0.0, ignore_eos=True)
    options = {"page_size": 16, "max_num_seqs": 2, "max_num_batched_tokens": 32, "max_model_len": 96}
    with LLM(found.folder, dtype="float32", **options) as llm:
        for prompt in (PROMPT, 40):  # the longer one in two chunks
            wanted = found.tokens[prompt:]
            made = llm.generate([found.tokens[:prompt]], params, use_tqdm=False)[0].outputs[0].token_ids
            assert same_tokens(list(made[: len(wanted)]), wanted, found.gaps[prompt - 1 : -1])


def test_towers_say_nothing_of_dtypes(tmp_path, tensors):
    """Where config.json has none; and loading ends at 100%, without their bytes."""
    text = {name: np.asarray(tensor, ml_dtypes.bfloat16) for name, tensor in spelt(tensors).items()}
    folder = write_checkpoint(tmp_path / "model", WRAPPED, TOWER | text)
    said = []
    with open_weights(folder) as weights:
        assert choose_dtype("auto", WRAPPED, weights, Device(0, "tpu")) == ml_dtypes.bfloat16
        assert stored_dtype(WRAPPED, weights) == ml_dtypes.bfloat16
    with LLM(folder, on_progress=said.append, dtype="float32", **OPTIONS):
        assert [text for text in said if "loading" in text][-1] == "loading weights 100%"


def refuses_images(llm):
    image = {"type": "image_url", "image_url": {"url": "data:,"}}
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    for call in (
        lambda: llm.chat([{"role": "user", "content": [image]}], PARAMS, use_tqdm=False, chat_template=template),
        lambda: llm.generate({"prompt": "x", "multi_modal_data": {"image": 1}}, PARAMS, use_tqdm=False),
    ):
        assert "text is supported: Mistral 3's vision tower is not loaded, its text model alone is" in line(
            call, UnsupportedError
        )


def test_fields_of_the_text_model_are_found(tmp_path):
    """Also a quantization that only it names, which is the checkpoint's."""
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    text = TEXT | {"quantization_config": fp8}
    (tmp_path / "config.json").write_text(json.dumps(WRAPPED | {"text_config": text}))
    config = read_config(tmp_path)
    assert config["quantization_config"] == fp8
    assert config["text_config"] == TEXT
    both = WRAPPED | {"text_config": text, "quantization_config": {"quant_method": "awq"}}
    (tmp_path / "config.json").write_text(json.dumps(both))
    assert read_config(tmp_path) == both


def test_quantized_by_transformers(tmp_path, tensors):
    """As Ministral 3 is: e4m3 with a scale a matrix, and one of activations, and what is left out by its old names."""
    made = {}
    for name, tensor in tensors.items():
        if ".layers." in name and tensor.ndim == 2 and "layers.0.mlp.up_proj" not in name:
            scale = np.abs(tensor).max() / 448
            made[name] = (tensor / scale).astype(ml_dtypes.float8_e4m3fn)
            made[name.replace("weight", "weight_scale_inv")] = np.array(scale, np.float32)
            made[name.replace("weight", "activation_scale")] = np.array(1, np.float32)
        else:
            made[name] = tensor
    config = WRAPPED | {
        "quantization_config": {
            "quant_method": "fp8",
            "activation_scheme": "static",
            "weight_block_size": None,
            "modules_to_not_convert": ["vision_tower", "multi_modal_projector", "lm_head"],
        }
    }
    _, params, _ = loaded(stored(tmp_path, spelt(made) | TOWER), config)
    name = "model.layers.1.mlp.up_proj.weight"
    values = np.asarray(params[name]).astype(np.float32) * np.asarray(params[f"{name}_scale"])
    wanted = tensors["model.language_model.layers.1.mlp.up_proj.weight"]
    np.testing.assert_allclose(values, wanted, atol=np.abs(wanted).max() / 16)
    np.testing.assert_array_equal(
        params["model.layers.0.mlp.up_proj.weight"], tensors["model.language_model.layers.0.mlp.up_proj.weight"]
    )


def test_in_a_deployment(tmp_path, cli):
    file = tmp_path / "deployment.yaml"
    file.write_text(f"model: x/y\ntopology: h100-1\narchitecture: {json.dumps(WRAPPED)}\n")
    assert read_deployment(file).architecture == WRAPPED
    assert cli("plan", file).out
    broken = WRAPPED | {"text_config": TEXT | {"num_hidden_layers": 0}}
    file.write_text(f"model: x/y\ntopology: h100-1\narchitecture: {json.dumps(broken)}\n")
    assert f"{file}:3: architecture: text_config: num_hidden_layers is 0" in cli("plan", file).error()


def test_another_architecture_than_the_deployments(tmp_path, tensors, monkeypatch):
    folder = write_checkpoint(tmp_path / "model", WRAPPED, spelt(tensors) | TOWER)
    refusal(folder, "num_layers is 2", architecture=WRAPPED | {"text_config": TEXT | {"num_hidden_layers": 3}})
    entry = REGISTRY["Mistral3ForConditionalGeneration"]
    texts = {**MISTRAL3.texts, "mixtral": "jaxinfer.models.mixtral"}
    monkeypatch.setitem(
        REGISTRY, "Mistral3ForConditionalGeneration", entry._replace(source=replace(MISTRAL3, texts=texts))
    )
    for kind, problem in (("ministral3", "max_context is 256"), ("mixtral", "text_config.model_type is 'mistral'")):
        refusal(folder, problem, architecture=WRAPPED | {"text_config": TEXT | {"model_type": kind}})


def test_a_deployment_of_a_head_that_only_weights_tell_of(tmp_path, tensors, cli):
    """As of Mistral Small: config.json says nothing, which ties embedding and head."""
    silent = {name: value for name, value in WRAPPED.items() if name != "tie_word_embeddings"}
    silent["text_config"] = {name: value for name, value in TEXT.items() if name != "tie_word_embeddings"}
    folder = write_checkpoint(tmp_path / "model", silent, spelt(tensors) | TOWER)
    file = tmp_path / "deployment.yaml"
    fields = f"model: {folder}\ntopology: h100-1\n" + "".join(f"{n}: {v}\n" for n, v in OPTIONS.items())
    file.write_text(f"{fields}architecture: {json.dumps(WRAPPED)}\n")
    with LLM.from_config(file):
        pass
    planned = json.loads(cli("plan", file, "--json").out)["bytes"]["weights"]
    (folder / "model.safetensors").unlink()
    assert json.loads(cli("plan", file, "--json").out)["bytes"]["weights"] == planned
    tied = json.loads(cli("plan", folder, "--topology", "h100-1", "--json").out)["bytes"]["weights"]
    assert tied < planned
