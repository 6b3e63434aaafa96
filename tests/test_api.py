"""`jaxinfer.generate`, `stream`, `chat` and `unload`: one call does it, and the model stays for the next."""

import gc
import json
import os
import subprocess
import sys
from typing import Literal

import jax
import pydantic
import pytest

import jaxinfer
from jaxinfer import SamplingParams, api
from tests.refusals import line
from tests.settled import settled

OPTIONS = {"max_num_seqs": 4, "max_num_batched_tokens": 64}  # those of test_llm.py: the same programs


@pytest.fixture(scope="module")
def folder(checkpoints):
    return checkpoints("llama").folder


@pytest.fixture(scope="module", autouse=True)
def unloaded():
    yield
    jaxinfer.unload()


def arrays() -> set[int]:
    gc.collect()
    return {id(array) for array in jax.live_arrays()}


def test_text_in_text_out_and_a_list_for_a_list(folder):
    prompts = ["One prompt", "and another one"]
    texts = jaxinfer.generate(prompts, model=folder, max_tokens=6, **OPTIONS)
    assert [type(text) for text in texts] == [str, str]
    text = jaxinfer.generate(prompts[0], model=folder, max_tokens=6, **OPTIONS)
    assert text == texts[0]
    ids = api._loaded[1].tokenizer.encode(prompts[0])
    assert jaxinfer.generate(ids, model=folder, max_tokens=6, **OPTIONS) == text
    assert jaxinfer.generate(prompts[:1], model=folder, max_tokens=6, **OPTIONS) == [text]
    assert jaxinfer.generate([], model=folder, **OPTIONS) == []
    assert "".join(jaxinfer.stream(prompts[0], model=folder, max_tokens=6, **OPTIONS)) == text
    assert "".join(jaxinfer.stream(prompts[0], folder, temperature=2.0, seed=1, **OPTIONS)) != text


def test_what_comes_back_is_the_llms(folder):
    """Defaults are the checkpoint's but for max_tokens; what is given goes through."""
    jaxinfer.generate("a", model=folder, max_tokens=1, **OPTIONS)
    llm = api._loaded[1]

    def text(prompt, **params) -> str:
        return llm.generate(prompt, SamplingParams(**params))[0].outputs[0].text

    assert jaxinfer.generate("a prompt", folder, **OPTIONS) == text("a prompt", temperature=0.0, max_tokens=256)
    sampling = {"temperature": 1.5, "seed": 5, "top_p": 0.9, "max_tokens": 30, "stop": ["e", "a"], "ignore_eos": True}
    assert jaxinfer.generate("a prompt", folder, **sampling, **OPTIONS) == text("a prompt", **sampling)
    messages = [{"role": "user", "content": "Hello"}]
    expected = text("user: Hello\nassistant:", temperature=0.0, max_tokens=20)
    assert jaxinfer.chat(messages, folder, max_tokens=20, **OPTIONS) == expected
    other = [{"role": "user", "content": "Bye"}]
    answers = jaxinfer.chat([messages, other], folder, max_new_tokens=20, **OPTIONS)
    assert answers == [expected, jaxinfer.chat(other, folder, max_tokens=20, **OPTIONS)]
    assert jaxinfer.chat([other], folder, max_tokens=20, **OPTIONS) == answers[1:]


def test_sampling_params_are_no_model(folder):
    for call in (
        lambda: jaxinfer.generate("a", SamplingParams(max_tokens=3)),
        lambda: jaxinfer.generate("a", folder, sampling_params=SamplingParams(max_tokens=3)),
    ):
        assert "by name" in line(call)


def test_the_model_stays_for_the_next_call_with_the_same_arguments(folder):
    jaxinfer.generate("a", model=folder, max_tokens=2, **OPTIONS)
    llm, before = api._loaded[1], arrays()
    jaxinfer.generate("b", model=str(folder), temperature=1.0, seed=3, max_tokens=2, **OPTIONS)
    jaxinfer.chat([{"role": "user", "content": "c"}], model=folder, max_tokens=2, **OPTIONS)
    next(jaxinfer.stream("d", model=folder, on_progress=lambda text: None, **OPTIONS))
    assert api._loaded[1] is llm
    settled(llm)
    assert len(arrays()) == len(before)


def test_another_model_or_option_takes_its_place_and_its_memory(folder, tmp_path):
    other = tmp_path / "other"
    other.symlink_to(folder)
    jaxinfer.unload()
    before = arrays()
    for model, more in ((folder, {}), (folder, {"dtype": "float32"}), (other, {"dtype": "float32"})):
        previous = api._loaded[1] if api._loaded else None
        held = [array for array in jax.live_arrays() if id(array) not in before]
        assert jaxinfer.generate("a", model=model, max_tokens=2, **more, **OPTIONS)
        assert api._loaded[1] is not previous
        assert all(array.is_deleted() for array in held)
        if previous is not None:
            assert held
            with pytest.raises(ValueError, match="this LLM was closed"):
                previous.generate("a")


def test_unload_frees_everything(folder):
    jaxinfer.unload()
    before = arrays()
    # As many as there is room for: it must not come to its end before it is unloaded.
    stream = jaxinfer.stream("a", model=folder, max_tokens=250, ignore_eos=True, **OPTIONS)
    next(stream)
    jaxinfer.unload()
    assert not arrays() - before
    with pytest.raises(ValueError, match="this LLM was closed: load it again"):
        list(stream)
    jaxinfer.unload()  # nothing is loaded: nothing happens
    assert jaxinfer.generate("a", model=folder, max_tokens=2, **OPTIONS)


def test_a_model_that_does_not_load_leaves_none(folder, tmp_path):
    jaxinfer.generate("a", model=folder, max_tokens=2, **OPTIONS)
    with pytest.raises(OSError, match="nothing"):
        jaxinfer.generate("a", model=tmp_path / "nothing")
    assert jaxinfer.generate("a", model=folder, max_tokens=2, **OPTIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_token": 5}, "'max_token' is not supported: did you mean max_tokens"),
        ({"best_of": 2}, "best_of: all n continuations"),
        ({"num_return_sequences": 2}, "n does not show in the text"),
        ({"enforce_eager": True, "temp": 9e9}, "enforce_eager: not needed"),
        ({"n": 2}, "n does not show in the text"),
        ({"top_p": 0}, "top_p is 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"dtype": "int3"}, "dtype is 'int3'"),
    ],
)
@pytest.mark.parametrize("call", [jaxinfer.generate, jaxinfer.stream])
def test_a_wrong_option_is_refused_before_anything_is_loaded(folder, call, options, message):
    jaxinfer.generate("a", model=folder, max_tokens=2, **OPTIONS)
    llm = api._loaded[1]
    with pytest.raises(ValueError, match=message):
        call("a", model=folder, **options)
    if "dtype" not in options:
        assert api._loaded[1] is llm


# A process of its own: what others in this one allocate would blur it. 64 MiB of weights, loaded three times.
MEMORY = """
import gc, json, os, sys, psutil, jaxinfer
def resident():
    gc.collect()
    return psutil.Process().memory_info().rss / 2**20
def load(seed):
    jaxinfer.generate([[1, 2, 3]], model=sys.argv[1 + seed], max_tokens=2, max_num_seqs=1)
    return resident()
load(0)
jaxinfer.unload()
empty = resident()  # what stays is code: libraries and compiled programs
loaded = load(0)
replaced = load(1)
jaxinfer.unload()
print(json.dumps([empty, loaded, replaced, resident()]))
"""


@pytest.mark.slow
def test_process_memory_goes_back(folder, tmp_path):
    import numpy as np
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 2**17}
    for name in list(tensors):
        for kind in ("gate", "up", "down"):
            if f"{kind}_proj" in name:
                shape = (32, 2**17) if kind == "down" else (2**17, 32)
                tensors[name] = np.zeros(shape, np.float32)
    folders = [tmp_path / "first", tmp_path / "second"]
    for made in folders:
        made.mkdir()
        save_file(tensors, made / "model.safetensors")
        (made / "config.json").write_text(json.dumps(config))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (made / name).write_bytes((folder / name).read_bytes())
    weights = sum(tensor.nbytes for tensor in tensors.values()) / 2**20
    assert weights > 90
    environment = os.environ | {"XLA_FLAGS": ""}
    command = [sys.executable, "-c", MEMORY, *map(str, folders)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    empty, loaded, replaced, after = json.loads(result.stdout.splitlines()[-1])
    assert loaded - empty > 0.8 * weights
    assert replaced - empty < 1.8 * weights  # both models would be 2
    assert after - empty < 0.5 * weights


class Answer(pydantic.BaseModel):
    good: bool
    grade: Literal["a", "b"]


@pytest.mark.slow
def test_a_schema_gives_what_the_text_says(folder):
    sampling = {"max_tokens": 160, "temperature": 1.0, "seed": 1} | OPTIONS
    assert isinstance(jaxinfer.generate("one", folder, schema=Answer, **sampling), Answer)
    several = jaxinfer.generate(["one", "two"], folder, schema={"enum": [1, None]}, **sampling)
    assert len(several) == 2
    assert set(several) <= {1, None}
    assert jaxinfer.chat([{"role": "user", "content": "a"}], folder, schema={"const": ["x"]}, **sampling) == ["x"]
    assert jaxinfer.generate("one", folder, guided_choice=["yes"], **sampling) == "yes"
    assert "raise max_tokens" in line(
        lambda: jaxinfer.generate("one", folder, schema=Answer, **sampling | {"max_tokens": 3})
    )
    assert "leave one of them out" in line(
        lambda: jaxinfer.generate("one", folder, schema=Answer, structured_outputs={"regex": "a"})
    )
