"""Whatever is wrong with what a user gives: one clear line, in Python as ValueError or OSError, from the command line
with exit code 2; never a traceback, and nothing is run or left behind. For the fields of config.json see
tests/models/test_config_fields.py."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxinfer
from jaxinfer import LLM, SamplingParams
from tests.refusals import HUGE, change, line, refusal

WEIGHTS = "model.safetensors"


@pytest.fixture
def model(checkpoints, tmp_path) -> Path:
    """A copy of a good checkpoint, to be broken."""
    return shutil.copytree(checkpoints("llama").folder, tmp_path / "model")


# Where the model is


def test_no_such_folder(tmp_path, cli):
    for name in (f"{tmp_path}/none", "./none", "~/none/of/it", "a/b/c"):
        refusal(name, "none" if "none" in name else name, "no such folder", kind=FileNotFoundError)
    refusal("gs:/bucket/model", "model gs:/bucket/model", "lost a slash")
    for strange in (None, 5):
        refusal(strange, f"model is {strange}", "folder")
    (tmp_path / "file").touch()
    refusal(tmp_path / "file", "not a folder", kind=NotADirectoryError)
    assert cli("generate", "x", "--model", tmp_path / "none").error() == f"{tmp_path}/none: no such folder"


def test_hub_without_network(cli):
    """HF_HUB_OFFLINE=1 is set for all tests; tests/checkpoint/test_hub.py has hubs that answer, and that hang."""
    refusal("nobody/nothing", "nobody/nothing", "HF_HUB_OFFLINE", kind=ConnectionError)
    assert "not in the hub's cache" in cli("generate", "x", "--model", "nobody/nothing").error()
    refusal("no such id!", "hub id")


def test_a_revision_of_a_folder(model, cli):
    refusal(model, "revision 'main'", "local folder", revision="main")
    assert "local folder" in cli("generate", "x", "--model", model, "--revision", "main").error()


# config.json


def test_config_is_missing(model, cli):
    (model / "config.json").unlink()
    refusal(model, model / "config.json", kind=FileNotFoundError)
    assert "config.json" in cli("generate", "x", "-m", model).error()


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (b"", "not JSON"),
        (b'{"model_type": "llama"', "not JSON"),
        (b"[1]", "JSON object"),
        (b"\xff\xfe", "UTF-8"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"vocab_size": %s}' % (b"9" * 5000), "thousands of digits"),
    ],
)
def test_config_is_not_json(model, cli, content, fact):
    (model / "config.json").write_bytes(content)
    refusal(model, model / "config.json", fact)
    assert fact in cli("generate", "x", "-m", model).error()


def test_model_type(model, cli):
    for model_type in ("t5", ..., None, 5, ["llama"], "x" * 10_000):
        change(model, model_type=model_type)
        refusal(model, "model_type", "`jaxinfer models` lists all")
    change(model, model_type="t5")
    assert "'t5' is not supported" in cli("generate", "x", "-m", model).error()


def test_remote_code_is_never_run(model, cli, tmp_path):
    trap = f"open({str(tmp_path / 'was-run')!r}, 'w').close()\n"
    for name in ("configuration_mine", "modeling_mine", "tokenization_mine"):
        (model / f"{name}.py").write_text(trap)
    auto_map = {
        "AutoConfig": "configuration_mine.Config",
        "AutoModelForCausalLM": "modeling_mine.Model",
        "AutoTokenizer": ["tokenization_mine.Tokenizer", None],
    }
    change(model, auto_map=auto_map)
    change(model, "tokenizer_config.json", auto_map=auto_map)
    assert cli("generate", "x", "-m", model, "--max-tokens", "2").code == 0  # a known model_type: our own code
    change(model, model_type="mine")
    refusal(model, "'mine' is not supported", "auto_map", "never run")
    assert "never run" in cli("generate", "x", "-m", model).error()
    assert not (tmp_path / "was-run").exists()


def test_a_field_from_the_command_line(model, cli):
    change(model, num_key_value_heads=3)
    assert "num_key_value_heads is 3" in cli("generate", "x", "-m", model).error()


def test_eos(model):
    for value in ("2", -1, 2.5, [1, "2"], 2**40, True):
        change(model, eos_token_id=value)
        refusal(model, "config.json", "eos_token_id is")
        change(model, "generation_config.json", eos_token_id=value)
        refusal(model, "generation_config.json", "eos_token_id is")
        change(model, "generation_config.json", eos_token_id=...)


def test_generation_config(model, cli):
    change(model, "generation_config.json", do_sample=True, temperature=-1)
    with LLM(model) as llm:
        text = line(lambda: llm.generate("x"))
        assert "generation_config.json: sampling parameter temperature is -1" in text
        assert llm.generate("x", SamplingParams(max_tokens=1))
    assert "generation_config.json" in cli("generate", "x", "-m", model).error()
    (model / "generation_config.json").write_text("{")
    refusal(model, "generation_config.json", "not JSON")


# Weights


def test_pickled_weights_that_are_none(model, cli):
    """For hostile ones see tests/checkpoint/test_pickled_attacks.py."""
    (model / WEIGHTS).rename(model / "pytorch_model.bin")
    refusal(model, "pytorch_model.bin", "neither a zip archive nor the older form of torch.save")
    assert "save its state_dict() alone" in cli("generate", "x", "-m", model).error()


def test_no_weights(model):
    (model / WEIGHTS).unlink()
    refusal(model, "no weights", WEIGHTS, kind=FileNotFoundError)


def test_truncated_and_corrupt_weights(model, cli):
    whole = (model / WEIGHTS).read_bytes()
    length = int.from_bytes(whole[:8], "little")
    broken = {
        "empty": b"",
        "cut in the header": whole[:100],
        "cut in the data": whole[:-1],
        "longer": whole + b"x",
        "header of 2**62 bytes": (2**62).to_bytes(8, "little") + whole[8:],
        "no JSON": whole[:8] + b"x" * length + whole[8 + length :],
        "a dtype that is none": whole.replace(b'"F32"', b'"X32"', 1),
        "another size": whole.replace(b"[300,32]", b"[300,33]", 1),
    }
    for content in broken.values():
        (model / WEIGHTS).write_bytes(content)
        refusal(model, WEIGHTS, "not a valid safetensors file")
    assert "not a valid safetensors file" in cli("generate", "x", "-m", model).error()


def test_weights_of_a_wrong_dtype(model):
    tensors = load_file(model / WEIGHTS)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int32)
    save_file(tensors, model / WEIGHTS)
    refusal(model, "wrong dtypes", "model.norm.weight is int32")


def test_all_that_is_wrong_with_the_tensors_in_one_error(model, cli):
    tensors = load_file(model / WEIGHTS)
    del tensors["model.layers.0.mlp.up_proj.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((48, 32), np.float32)
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
    tensors["norm.weight"] = tensors["model.norm.weight"]
    tensors["lm_head.weight"] = tensors["lm_head.weight"].T.copy()
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].astype(np.int8)
    save_file(tensors, model / WEIGHTS)
    facts = (
        "missing tensors: model.layers.0.mlp.up_proj.weight, model.layers.1.mlp.up_proj.weight",
        "unknown tensors: model.layers.0.self_attn.q_proj.bias, model.layers.2.mlp.up_proj.weight",
        "tensors stored twice: model.norm.weight (also as norm.weight)",
        "wrong shapes: lm_head.weight [32, 300] instead of [300, 32]",
        "model.embed_tokens.weight is int8",
    )
    refusal(model, model, *facts)
    assert all(fact in cli("generate", "x", "-m", model).error() for fact in facts)


def test_weights_of_another_size(model):
    """As many problems as there are tensors, and still one line."""
    change(model, hidden_size=64, num_hidden_layers=30)
    refusal(model, "wrong shapes", "missing tensors", "more")


def test_weights_beyond_float16(model):
    tensors = load_file(model / WEIGHTS)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1e6
    save_file(tensors, model / WEIGHTS)
    refusal(model, "model.norm.weight", "65504", "bfloat16", dtype="float16")


def test_an_index_that_leads_outside(checkpoints, tmp_path, cli):
    model = shutil.copytree(checkpoints("llama-sharded-mha-tied").folder, tmp_path / "model")
    index = model / f"{WEIGHTS}.index.json"
    good = json.loads(index.read_text())
    first = next(iter(good["weight_map"]))
    outside = shutil.copy(model / good["weight_map"][first], tmp_path / "outside.safetensors")
    for name in (str(outside), "../outside.safetensors", f"../model/{good['weight_map'][first]}"):
        index.write_text(json.dumps(good | {"weight_map": good["weight_map"] | {first: name}}))
        refusal(model, "not *.safetensors files in the folder itself", name)
    assert name in cli("generate", "x", "-m", model).error()
    index.write_text(json.dumps(good | {"weight_map": good["weight_map"] | {first: "none.safetensors"}}))
    refusal(model, "none.safetensors", "missing files")


# Tokenizer


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"model": 5}', b"\xff", b'{"a":' * 10_000])
def test_tokenizer_is_broken(model, content):
    (model / "tokenizer.json").write_bytes(content)
    refusal(model, model / "tokenizer.json")
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.model").write_bytes(content)
    refusal(model, model / "tokenizer.model")


def test_tokenizer_config_is_broken(model):
    for content in ("{", "[]", '{"added_tokens_decoder": 5}', '{"clean_up_tokenization_spaces": "no"}'):
        (model / "tokenizer_config.json").write_text(content)
        refusal(model, model / "tokenizer_config.json")


def test_tokenizer_of_another_model(model, cli):
    content = json.loads((model / "tokenizer.json").read_text())
    content["model"]["vocab"]["extra"] = 300  # the model has ids 0 to 299
    (model / "tokenizer.json").write_text(json.dumps(content))
    refusal(model, "ids up to 300", "vocab_size 300")
    assert "ids up to 300" in cli("generate", "x", "-m", model).error()


def test_chat_template(model, cli):
    change(model, "tokenizer_config.json", chat_template="{{ raise_exception('roles\nmust alternate') }}")
    with LLM(model) as llm:
        assert "roles must alternate" in line(lambda: llm.chat([{"role": "user", "content": "x"}]))
        for messages in ([], "x", [{"content": "x"}], [{"role": "user"}], [5], [[]], None):
            line(lambda messages=messages: llm.chat(messages))
    assert "roles must alternate" in cli("generate", "x", "--chat", "-m", model).error()
    change(model, "tokenizer_config.json", chat_template="{% for %}")
    assert "chat template" in cli("chat", "-m", model, stdin=b"x").error()
    change(model, "tokenizer_config.json", chat_template=...)
    assert "chat template" in cli("generate", "x", "--chat", "-m", model).error()


# How it is loaded


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"dtype": "int8"}, ["dtype is 'int8'", "float32, bfloat16, float16"]),
        ({"dtype": None}, ["dtype is None"]),
        ({"max_model_len": 257}, ["max_model_len is 257", "at most 256"]),
        ({"max_model_len": 1}, ["max_model_len is 1", "at least 2"]),
        ({"max_model_len": 2**70}, [f"max_model_len is {2**70}", "at most 256"]),
        ({"max_model_len": "100"}, ["max_model_len is '100'"]),
        ({"seed": -1}, ["seed is -1"]),
        ({"seed": 1.5}, ["seed is 1.5"]),
        ({"max_num_seqs": 0}, ["max_num_seqs is 0"]),
        ({"max_num_seqs": 100_000}, ["max_num_seqs is 100000", "4096"]),
        ({"max_num_batched_tokens": True}, ["max_num_batched_tokens is True"]),
        ({"max_num_batched_tokens": 2, "max_num_seqs": 4}, ["max_num_batched_tokens is 2", "max_num_seqs, 4"]),
        ({"page_size": 0}, ["page_size is 0"]),
        ({"kv_cache_memory": 0}, ["kv_cache_memory is 0"]),
        ({"kv_cache_memory": 10**13}, ["kv_cache_memory is 10,000,000,000,000", "a device here has"]),
        ({"kv_cache_memory": 2**70}, [f"kv_cache_memory is {2**70:,}", "a device here has"]),
        # 2 layers x (keys + values) x 2 heads x 8 x 4 bytes are 256 a token, a page of 16 tokens 4096.
        ({"kv_cache_memory": 8191}, ["max_model_len 256", "8,191", "raise kv_cache_memory"]),
        ({"kv_cache_memory": 40_960, "max_model_len": 200}, ["max_model_len 200", "at most 144", "kv_cache_memory"]),
    ],
)
def test_options_of_loading(checkpoints, options, facts):
    refusal(checkpoints("llama").folder, *facts, **options)


def test_options_of_loading_from_the_command_line(checkpoints, cli):
    model = checkpoints("llama").folder
    for options, fact in [
        (["--dtype", "int8"], "'int8'"),
        (["--max-model-len", "257"], "max_model_len is 257"),
        (["--max-model-len", "-1"], "max_model_len is -1"),
    ]:
        assert fact in cli("generate", "x", "-m", model, *options).error()


def test_dynamic_rope_beyond_its_context(checkpoints):
    """There the result would depend on how a prompt is cut."""
    folder = checkpoints("llama-dynamic").folder
    refusal(folder, "max_model_len is 300", "at most 256", max_model_len=300)
    with LLM(folder) as llm:
        assert "at most 255" in line(lambda: llm.generate({"prompt_token_ids": [5] * 256}))
        (output,) = llm.generate({"prompt_token_ids": [5] * 250}, SamplingParams(temperature=0, max_tokens=100))
        assert (len(output.outputs[0].token_ids), output.outputs[0].finish_reason) == (6, "length")


def test_a_cache_folder_that_cannot_be_written(checkpoints, cli, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("JAXINFER_CACHE_DIR", str(tmp_path / "file" / "programs"))
    model = checkpoints("llama").folder
    refusal(model, tmp_path / "file" / "programs", "JAXINFER_CACHE_DIR")
    assert "JAXINFER_CACHE_DIR" in cli("generate", "x", "-m", model).error()


@pytest.mark.parametrize("variable", ["JAXINFER_CACHE_DIR", "JAX_COMPILATION_CACHE_DIR"])
@pytest.mark.parametrize("url", ["gs://bucket/cache", "memory://cache"])
def test_a_cache_in_a_bucket(tmp_path, variable, url):
    """JAX is left to keep it there, or it is refused; it does not become a folder called gs: here."""
    script = """
import jax
from jaxinfer.compile_cache import enable_compile_cache
enable_compile_cache()
print(jax.config.jax_compilation_cache_dir)
"""
    env = {name: value for name, value in os.environ.items() if name != "JAXINFER_CACHE_DIR"} | {variable: url}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    if url.startswith("gs"):
        assert done.stdout == f"{url}\n", done.stderr
    else:
        assert f"ValueError: cache folder {url}: JAX knows no such URLs: set JAXINFER_CACHE_DIR to" in done.stderr
    assert not list(tmp_path.iterdir())


# Requests


@pytest.fixture(scope="module")
def llm(checkpoints):
    with LLM(checkpoints("llama").folder) as llm:
        yield llm


@pytest.mark.parametrize(
    ("prompt", "facts"),
    [
        ("", ["the prompt is empty"]),
        ({"prompt": ""}, ["the prompt is empty"]),
        ({"prompt_token_ids": []}, ["the prompt is empty"]),
        ([[]], ["the prompt is empty"]),
        (["x", ""], ["prompt 1", "the prompt is empty"]),
        ("x" * 256, ["256 tokens", "at most 255", "max_model_len"]),
        (["x", "x" * 1000], ["prompt 1", "1000 tokens"]),
        ([0, 300], ["token id 300", "0 to 299"]),
        ([-1], ["token id -1", "0 to 299"]),
        ([[1], [2**70]], ["prompt 1", f"token id {2**70}"]),
        ("\ud800", ["not valid Unicode"]),
        (None, ["NoneType"]),
        (5, ["int"]),
        ([1.5], ["float"]),
        (b"hi", ["bytes"]),
        ([b"hi"], ["bytes", "decode it"]),
        ([bytearray(b"hi"), "x"], ["prompt 0", "bytearray"]),
        ([[1], memoryview(b"hi")], ["prompt 1", "memoryview"]),
        ({"prompt_token_ids": b"hi"}, ["bytes"]),
        ([True], ["bool"]),
        ({"prompt": 5}, ["int"]),
        ({"text": "x"}, ["prompt_token_ids", "text"]),
        ({"prompt": "x", "prompt_token_ids": [1]}, ["either"]),
    ],
)
def test_prompts(llm, prompt, facts):
    text = line(lambda: llm.generate(prompt))
    assert all(fact in text for fact in facts), text
    assert not llm.engine.scheduler.waiting_count


def test_prompts_from_the_command_line(checkpoints, cli):
    model = checkpoints("llama").folder
    assert "the prompt is empty" in cli("generate", "", "-m", model).error()
    assert "256 tokens" in cli("generate", "x" * 256, "-m", model).error()
    assert "prompt 1: the prompt has 256 tokens" in cli("generate", "x", "x" * 256, "-m", model).error()
    assert "256 tokens" in cli("chat", "-m", model, stdin=b"x" * (256 - len("user: \nassistant:"))).error()
    assert "not valid Unicode" in cli("generate", "\udcff", "-m", model).error()


NOT_NUMBERS = [math.nan, math.inf, -math.inf, "1", None, [1], True, HUGE]
NOT_INTEGERS = [0.5, math.nan, "1", [1], True, HUGE]
BAD_SAMPLING = {
    "temperature": [-0.1, 1e7, *NOT_NUMBERS],
    "top_p": [0, -0.1, 1.1, *NOT_NUMBERS],
    "min_p": [-0.1, 1.1, *NOT_NUMBERS],
    "top_k": [-2, 2**31, None, *NOT_INTEGERS],
    "seed": [2**63, -(2**63) - 1, *NOT_INTEGERS],
    "max_tokens": [0, -1, *NOT_INTEGERS],
    "min_tokens": [-1, 300, None, *NOT_INTEGERS],
    "logprobs": [-1, 21, *NOT_INTEGERS],
    "stop": ["", [""], ["x", None], 5, b"x"],
    "stop_token_ids": [[-1], [1.5], ["x"], "x", [True], list(range(9)), 2**31],
    "ignore_eos": [1, None, "yes"],
    "skip_special_tokens": [1, None],
    "include_stop_str_in_output": [0, None],
}


@pytest.mark.parametrize("name", BAD_SAMPLING)
def test_sampling_parameters(name):
    for value in BAD_SAMPLING[name]:
        assert f"sampling parameter {name} is " in line(lambda value=value: SamplingParams(**{name: value}))
        # Nothing is loaded before they are looked at.
        assert f"sampling parameter {name} is " in line(
            lambda value=value: jaxinfer.generate("x", model="/none", **{name: value})
        )


def test_unknown_sampling_parameters():
    assert "did you mean temperature?" in line(lambda: SamplingParams(temprature=0.5))
    for name in ("bes_of", "beams", "presence"):
        text = line(lambda name=name: jaxinfer.generate("x", model="/none", **{name: 1}))
        assert f"{name!r} is not supported" in text
        assert "top_p" in text


def test_sampling_parameters_for_these_prompts(llm, checkpoints):
    assert "dict" in line(lambda: llm.generate("x", {"temperature": 0.5}))
    assert "2 for 1 prompts" in line(lambda: llm.generate("x", [SamplingParams(), SamplingParams()]))
    eight = SamplingParams(stop_token_ids=list(range(8)))
    assert "at most 8" in line(lambda: llm.generate("x", eight))  # with the checkpoint's own


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--temperature", ["-1", "nan", "inf", "1e7"]),
        ("--top-p", ["0", "1.5", "nan"]),
        ("--min-p", ["-0.5", "2"]),
        ("--top-k", ["-2", "99999999999"]),
        ("--max-tokens", ["0", "-5"]),
        ("--seed", ["9223372036854775808"]),
        ("--stop", [""]),
    ],
)
def test_sampling_options(cli, option, values):
    for command in (["generate", "x"], ["chat"]):
        for value in values:
            name = option.removeprefix("--").replace("-", "_")
            assert f"sampling parameter {name} is" in cli(*command, "--model", "/none", option, value).error()


def test_a_closed_llm(checkpoints):
    llm = LLM(checkpoints("llama").folder)
    llm.close()
    assert "closed" in line(lambda: llm.generate("x"))
