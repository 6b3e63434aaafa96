"""Checkpoints without a tokenizer: token ids in, token ids out, and a line for what needs text."""

import json
import shutil
from pathlib import Path

import pytest

from jaxinfer import LLM, SamplingParams
from jaxinfer.batch import run
from jaxinfer.benchmark import random_work, throughput
from jaxinfer.convert import convert
from tests.refusals import change, line, refusal

OPTIONS = {"max_num_seqs": 4, "max_num_batched_tokens": 32}
PROMPTS = [[5, 17, 200, 33], [7, 8], [256, 1, 2, 3]]
PARAMS = SamplingParams(temperature=0.0, max_tokens=8, logprobs=2, ignore_eos=True)


@pytest.fixture(scope="module")
def whole(checkpoints) -> Path:
    return checkpoints("llama").folder


@pytest.fixture(scope="module")
def bare(whole, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bare") / "model"
    folder.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(whole / name, folder)
    change(folder, bos_token_id=1)
    return folder


@pytest.fixture(scope="module")
def llm(bare):
    with LLM(bare, **OPTIONS) as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(whole):
    """What the same model gives that has its tokenizer."""
    with LLM(whole, **OPTIONS) as llm:
        return llm.generate(PROMPTS, PARAMS, use_tqdm=False), llm.score(PROMPTS, use_tqdm=False)


def test_ids_in_and_ids_out(llm, expected):
    for ours, theirs in zip(llm.generate(PROMPTS, PARAMS, use_tqdm=False), expected[0], strict=True):
        completion = ours.outputs[0]
        assert completion.token_ids == theirs.outputs[0].token_ids
        assert completion.text == ""
        assert [list(step) for step in completion.logprobs] == [list(step) for step in theirs.outputs[0].logprobs]
        assert completion.cumulative_logprob == pytest.approx(theirs.outputs[0].cumulative_logprob, abs=1e-4)
    assert list(llm.stream(PROMPTS[0], PARAMS)) == []
    *_, (_, last) = llm.stream_output({"prompt_token_ids": PROMPTS[0]}, PARAMS)
    assert last.outputs[0].token_ids == expected[0][0].outputs[0].token_ids
    (beams,) = llm.beam_search([PROMPTS[0]], beam_width=2, max_tokens=3)
    assert [sequence.text for sequence in beams.sequences] == ["", ""]


def test_scores(llm, expected):
    for ours, theirs in zip(llm.score(PROMPTS, use_tqdm=False), expected[1], strict=True):
        assert ours.token_ids == theirs.token_ids
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
    (pair,) = llm.score([PROMPTS[0][:2]], [PROMPTS[0][2:]], use_tqdm=False)
    assert pair.logprobs == pytest.approx(expected[1][0].logprobs[-2:], abs=1e-4)
    (rolling,) = llm.loglikelihood_rolling([PROMPTS[0]], use_tqdm=False)  # config.json has a BOS
    assert len(rolling.token_ids) == 4


def test_what_needs_text_says_what_is_missing(llm, bare, cli):
    hello = [{"role": "user", "content": "hello"}]
    for call, facts in [
        (lambda: llm.generate("hello"), ("text", "token ids")),
        (lambda: next(llm.stream("hello")), ("text", "token ids")),
        (lambda: llm.score(["hello"]), ("text", "token ids")),
        (lambda: llm.beam_search("hello", beam_width=2, max_tokens=2), ("text", "token ids")),
        (lambda: llm.chat(hello), ("chat", "token ids")),
        (lambda: llm.generate([PROMPTS[0]], SamplingParams(stop=["x"])), ("stop", "stop_token_ids")),
        (lambda: llm.generate([PROMPTS[0]], SamplingParams(bad_words=["x"])), ("bad_words", "bad_words_ids")),
    ]:
        message = line(call)
        assert all(fact in message for fact in (*facts, str(bare), "has none", "tokenizer=PATH")), message
    (output,) = llm.generate(["hello"], on_error="return", use_tqdm=False)
    assert "tokenizer" in output.error
    result = cli("generate", "x", "-m", bare)
    assert (result.code, result.out) == (2, "")
    assert "text: needs a tokenizer" in result.err


def test_throughput(llm):
    assert throughput(llm, random_work(300, [4, 9], [3, 5]))["num_requests"] == 2


@pytest.mark.parametrize("task", ["generate", "score"])
def test_batch(llm, expected, tmp_path, task):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt_token_ids": prompt}) + "\n" for prompt in [*PROMPTS, []]))
    with rows.open("a") as file:
        file.write('{"text": "hello"}\n')
    params = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True} if task == "generate" else None
    if task == "generate":
        assert "token_ids" in line(lambda: run(rows, tmp_path / "out.jsonl", model=llm, sampling_params=params))
    run(rows, tmp_path / "out.jsonl", model=llm, task=task, sampling_params=params, token_ids=True)
    *good, empty, text = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    for row, output, score in zip(good, *expected, strict=True):
        if task == "generate":
            assert (row["token_ids"], row["generated_text"]) == (output.outputs[0].token_ids, "")
        else:
            assert row["token_logprobs"] == pytest.approx(score.logprobs, abs=1e-4)
    assert empty["error"]
    assert "needs a tokenizer" in text["error"]


def test_a_tokenizer_from_elsewhere(bare, whole, llm, cli):
    with LLM(bare, tokenizer=whole, **OPTIONS) as other:
        assert other.tokenizer.folder == whole
        params = SamplingParams(temperature=0.0, max_tokens=8, stop="never", bad_words=["zz"])
        (output,) = other.generate("hello", params, use_tqdm=False)
        assert output.outputs[0].text
        assert output.outputs[0].token_ids == other.generate([output.prompt_token_ids], params)[0].outputs[0].token_ids
    result = cli("generate", "hello", "-m", bare, "--tokenizer", whole, "--max-tokens", "4", "--temperature", "0")
    assert result.code == 0
    assert result.out
    refusal(bare, "none", "no such folder", kind=FileNotFoundError, tokenizer=f"{bare}/none")
    refusal(bare, bare, "tokenizer.json", "tokenizer.model", kind=FileNotFoundError, tokenizer=bare)
    refusal(bare, "tokenizer is 5", "folder", tokenizer=5)


def test_skipping_it(whole, expected):
    with LLM(whole, skip_tokenizer_init=True, **OPTIONS) as llm:
        outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in expected[0]]
        assert {o.outputs[0].text for o in outputs} == {""}
        assert "skip_tokenizer_init" in line(lambda: llm.generate("hello"))
    refusal(whole, "tokenizer is", "skip_tokenizer_init", tokenizer=str(whole), skip_tokenizer_init=True)
    refusal(whole, "skip_tokenizer_init is 1", skip_tokenizer_init=1)


def test_a_broken_one_can_be_skipped(bare, tmp_path):
    folder = shutil.copytree(bare, tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{")
    refusal(folder, "tokenizer_config.json")
    with LLM(folder, skip_tokenizer_init=True, **OPTIONS) as llm:
        assert llm.generate([PROMPTS[0]], PARAMS, use_tqdm=False)[0].outputs[0].token_ids


def test_converting(bare, expected, tmp_path):
    convert(bare, tmp_path / "converted", show_progress=False)
    with LLM(tmp_path / "converted", **OPTIONS) as llm:
        outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in expected[0]]
