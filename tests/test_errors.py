"""Which error a refused request is, and which of its fields that is about: what a server needs to answer with."""

import asyncio
import pickle
import shutil

import pytest

import jaxinfer
from jaxinfer import (
    LLM,
    AsyncEngine,
    CheckpointError,
    ContextLengthError,
    EngineClosed,
    QueueFullError,
    RequestError,
    SamplingParams,
    UnsupportedError,
)
from jaxinfer.errors import placed
from tests.refusals import change, line

OPTIONS = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "max_model_len": 64}
USER = {"role": "user", "content": "x"}
GREEDY = SamplingParams(temperature=0.0, max_tokens=4)
LONG = [5] * 64
BEAMS = {"beam_width": 2, "max_tokens": 4}


@pytest.fixture(scope="module")
def llm(checkpoints):
    with LLM(checkpoints("llama").folder, **OPTIONS) as llm:
        yield llm


@pytest.fixture(scope="module")
def bare(checkpoints):
    with LLM(checkpoints("llama").folder, skip_tokenizer_init=True, **OPTIONS) as llm:
        yield llm


def refused(call, kind, param):
    with pytest.raises(ValueError) as caught:
        call()
    assert (type(caught.value), caught.value.param) == (kind, param)
    assert line(call)


@pytest.mark.parametrize(
    ("fields", "kind", "param"),
    [
        ({"temperature": -1}, RequestError, "temperature"),
        ({"temp": -1}, RequestError, "temperature"),
        ({"top_p": 0}, RequestError, "top_p"),
        ({"n": 0}, RequestError, "n"),
        ({"max_tokens": 2, "min_tokens": 3}, RequestError, "min_tokens"),
        ({"stop": [""]}, RequestError, "stop"),
        ({"stop": "a", "detokenize": False}, RequestError, "stop"),
        ({"logit_bias": {"a": 1}}, RequestError, "logit_bias"),
        ({"bad_words_ids": [[]]}, RequestError, "bad_words_ids"),
        ({"exponential_decay_length_penalty": 1}, RequestError, "exponential_decay_length_penalty"),
        ({"tempature": 1}, RequestError, "tempature"),
        ({"max_new_tokens": 5, "max_tokens": 6}, RequestError, "max_new_tokens"),
        ({"do_sample": False, "temperature": 0.7}, RequestError, "do_sample"),
        ({"best_of": 2}, UnsupportedError, "best_of"),
        ({"max_time": 1}, UnsupportedError, "max_time"),
        ({"max_time": 1, "tempature": 1}, RequestError, "max_time"),
        ({"guided_json": "{"}, RequestError, "structured_outputs"),
    ],
)
def test_sampling_parameters(fields, kind, param):
    refused(lambda: SamplingParams(**fields), kind, param)
    if "tempature" not in fields:
        refused(lambda: GREEDY.with_changes(**fields), kind, param)
    refused(lambda: jaxinfer.generate("x", **fields), kind, param)


@pytest.mark.parametrize(
    ("prompt", "params", "kind", "param"),
    [
        ("", {}, RequestError, "prompt"),
        ([], {}, RequestError, "prompt"),
        ([1.5], {}, RequestError, "prompt"),
        (b"x", {}, RequestError, "prompt"),
        ("\ud800", {}, RequestError, "prompt"),
        ([10**6], {}, RequestError, "prompt"),
        (LONG, {}, ContextLengthError, "prompt"),
        ({"text": "x"}, {}, RequestError, "prompt"),
        ({"prompt": "x", "cache_salt": 5}, {}, RequestError, "cache_salt"),
        ("x", {"stop": "\ud800"}, RequestError, "stop"),
        ("x", {"stop_token_ids": [10**6]}, RequestError, "stop_token_ids"),
        ("x", {"stop_token_ids": [*range(8)]}, RequestError, "stop_token_ids"),
        ("x", {"logit_bias": {10**6: 1.0}}, RequestError, "logit_bias"),
        ("x", {"forced_eos_token_id": 10**6}, RequestError, "forced_eos_token_id"),
        ("x", {"allowed_token_ids": [5], "suppress_tokens": [5]}, RequestError, "allowed_token_ids"),
    ],
)
def test_prompts_and_parameters(llm, engine, prompt, params, kind, param):
    """However it is asked: alone, among others, as a stream, in asyncio."""
    params = SamplingParams(max_tokens=4, **params)

    async def ask():
        return [output async for output in engine.generate(prompt, params)]

    if not isinstance(prompt, bytes) and prompt != []:  # those are no list of prompts either
        refused(lambda: llm.generate(prompt, params), kind, param)
    refused(lambda: llm.generate(["x", prompt], params), kind, param)
    refused(lambda: list(llm.generate_iter(iter([prompt]), params)), kind, param)
    refused(lambda: llm.stream(prompt, params), kind, param)
    refused(lambda: asyncio.run(ask()), kind, param)


@pytest.fixture(scope="module")
def engine(checkpoints):
    engine = AsyncEngine(checkpoints("llama").folder, max_queued=1, **OPTIONS)
    yield engine
    engine.close()


@pytest.mark.parametrize(
    ("call", "kind", "param"),
    [
        (lambda llm: llm.generate(5), RequestError, "prompts"),
        (lambda llm: llm.generate("x", {"n": 1}), RequestError, "sampling_params"),
        (lambda llm: llm.generate("x", [GREEDY, GREEDY]), RequestError, "sampling_params"),
        (lambda llm: llm.generate(["x", "y"], priority=[1]), RequestError, "priority"),
        (lambda llm: llm.generate("x", priority=["high"]), RequestError, "priority"),
        (lambda llm: llm.generate("x", on_error="ignore"), RequestError, "on_error"),
        (lambda llm: llm.generate("x", lora_request="a"), RequestError, "adapter"),
        (lambda llm: llm.generate(["x", "y"], adapter=["a"]), RequestError, "adapter"),
        (lambda llm: llm.score("xy", adapter=5), RequestError, "adapter"),
        (lambda llm: llm.generate("x", max_tokens=5), UnsupportedError, "max_tokens"),
        (lambda llm: llm.generate_iter("x"), RequestError, "prompts"),
        (lambda llm: llm.stream("x", SamplingParams(n=2)), UnsupportedError, "n"),
        (lambda llm: llm.chat([]), RequestError, "messages"),
        (lambda llm: llm.chat([{"content": "x"}]), RequestError, "messages"),
        (lambda llm: llm.chat([{"role": "user", "content": 5}]), RequestError, "messages"),
        (lambda llm: llm.chat([USER, USER | {"content": [{"type": "image_url"}]}]), UnsupportedError, "messages"),
        (lambda llm: llm.chat([USER | {"content": "x" * 500}]), ContextLengthError, "prompt"),
        (lambda llm: llm.chat([USER], tools=[5]), RequestError, "tools"),
        (lambda llm: llm.chat([USER], tools=[lambda x: x]), RequestError, "tools"),
        (lambda llm: llm.chat([USER], chat_template="nothing"), RequestError, "chat_template"),
        (lambda llm: llm.chat([USER], chat_template="{{ 1 / 0 }}"), RequestError, "chat_template"),
        (lambda llm: llm.chat([USER], chat_template="{{ x }}", x=object()), RequestError, "x"),
        (lambda llm: llm.chat([USER], padding=True), UnsupportedError, "padding"),
        (lambda llm: llm.chat([USER], continue_final_message="thinking"), RequestError, "continue_final_message"),
        (lambda llm: llm.score("x" * 500), ContextLengthError, "text"),
        (lambda llm: llm.score([[5]]), RequestError, "text"),
        (lambda llm: llm.score([[5, 10**6]]), RequestError, "text"),
        (lambda llm: llm.score("x", [5, 6]), RequestError, "continuation"),
        (lambda llm: llm.score("x", ""), RequestError, "continuation"),
        (lambda llm: llm.score(["x", "y"], ["z"]), RequestError, "continuations"),
        (lambda llm: llm.score_iter("x"), RequestError, "scorables"),
        (lambda llm: llm.loglikelihood_rolling(["x", ""]), RequestError, "text"),
        (lambda llm: llm.beam_search("x", beam_width=99, max_tokens=4), RequestError, "beam_width"),
        (lambda llm: llm.beam_search("x", beam_width=2, max_tokens=0), RequestError, "max_tokens"),
        (lambda llm: llm.beam_search("x", beam_width=2, max_tokens=64), ContextLengthError, "max_tokens"),
        (
            lambda llm: llm.beam_search("x", beam_width=2, max_tokens=4, length_penalty="1"),
            RequestError,
            "length_penalty",
        ),
        (lambda llm: llm.beam_search("x", **BEAMS, ignore_eos=1), RequestError, "ignore_eos"),
        (lambda llm: llm.beam_search("", **BEAMS), RequestError, "prompt"),
    ],
)
def test_calls(llm, call, kind, param):
    refused(lambda: call(llm), kind, param)


@pytest.mark.parametrize(
    ("call", "param"),
    [
        (lambda llm: llm.generate("x"), "prompt"),
        (lambda llm: llm.chat([USER]), "messages"),
        (lambda llm: llm.generate([[5]], SamplingParams(stop="x")), "stop"),
        (lambda llm: llm.generate([[5]], SamplingParams(bad_words=["x"])), "bad_words"),
    ],
)
def test_what_needs_a_tokenizer(bare, call, param):
    refused(lambda: call(bare), UnsupportedError, param)


def test_what_would_never_fit_the_cache(checkpoints):
    with LLM(checkpoints("llama").folder, page_size=8, max_num_seqs=1, max_model_len=64) as llm:
        llm.engine.scheduler.shards[0].cache.pools[0].num_pages = 3
        refused(lambda: llm.generate("x", SamplingParams(max_tokens=40)), ContextLengthError, "max_tokens")


def test_a_name_in_use_and_a_full_queue(engine):
    async def ask(name):
        async for _ in engine.generate("x", SamplingParams(max_tokens=60, ignore_eos=True), request_id=name):
            pass

    async def both(*names):
        return await asyncio.gather(*map(ask, names), return_exceptions=True)

    _, error = asyncio.run(both("a", "a"))
    assert (type(error), error.param) == (RequestError, "request_id")
    assert QueueFullError in map(type, asyncio.run(both(*"abcdefgh")))


def test_a_closed_engine(checkpoints):
    llm = LLM(checkpoints("llama").folder, **OPTIONS)
    llm.close()
    for call in (llm.generate, llm.stream, llm.score):
        with pytest.raises(EngineClosed):
            call("xyz")


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "generation_config.json", "tokenizer_config.json"]
)
def test_damaged_files(checkpoints, tmp_path, name):
    folder = shutil.copytree(checkpoints("llama").folder, tmp_path / "model")
    (folder / name).write_text("{")
    with pytest.raises(CheckpointError, match=name):
        LLM(folder)


def test_fields_of_files(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints("llama").folder, tmp_path / "model")
    change(folder, "generation_config.json", do_sample=True, temperature=-1.0)
    with LLM(folder, **OPTIONS) as llm, pytest.raises(CheckpointError, match="temperature"):
        llm.generate("x")
    change(folder, hidden_size="wide")
    with pytest.raises(CheckpointError, match="hidden_size"):
        LLM(folder)


def test_errors_keep_what_they_say():
    error = pickle.loads(pickle.dumps(ContextLengthError("too long", "prompt")))
    assert (type(error), str(error), error.param) == (ContextLengthError, "too long", "prompt")
    assert (str(placed("prompt 3", error)), placed("prompt 3", error).param) == ("prompt 3: too long", "prompt")
    assert type(placed("prompt 3", EngineClosed("gone"))) is ValueError
    assert UnsupportedError.at("messages[0].content", "no").param == "messages"
    assert RequestError("why").param is None
    from jaxinfer import async_engine
    from jaxinfer.engine import thread

    assert (async_engine.QueueFullError, thread.EngineClosed) == (QueueFullError, EngineClosed)
