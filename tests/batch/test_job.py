"""Jobs on the packaged model, within this process."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxinfer import SamplingParams
from jaxinfer.batch import TooManyErrors, loop, merge, run
from jaxinfer.demo import MODEL_DIR
from tests.batch.conftest import QUESTIONS, SHORT, files, read_rows


def test_results_beside_the_columns(demo, job, rows_file, tmp_path):
    summary = job(rows_file(QUESTIONS), token_ids=True)
    outputs = demo.generate([row["prompt"] for row in QUESTIONS], SamplingParams(temperature=0.0, **SHORT))
    assert read_rows(tmp_path / "out") == [
        {
            **row,
            "generated_text": output.outputs[0].text,
            "finish_reason": output.outputs[0].finish_reason,
            "token_ids": output.outputs[0].token_ids,
            "prompt_tokens": len(output.prompt_token_ids),
            "generated_tokens": len(output.outputs[0].token_ids),
            "error": None,
        }
        for row, output in zip(QUESTIONS, outputs, strict=True)
    ]
    assert list(files(tmp_path / "out")) == ["part-00000.jsonl", "part-00001.jsonl", "part-00002.jsonl"]
    assert [content.count(b"\n") for content in files(tmp_path / "out").values()] == [10, 10, 5]
    assert (summary.complete, summary.rows, summary.rows_now, summary.errors) == (True, 25, 25, 0)
    assert summary.prompt_tokens == sum(len(output.prompt_token_ids) for output in outputs)
    assert summary.generated_tokens == sum(len(output.outputs[0].token_ids) for output in outputs)
    assert summary.seconds > 0 < summary.tokens_per_second
    assert 0 < summary.device_share <= 1


def test_rows_with_parameters_of_their_own(demo, job, rows_file, tmp_path):
    rows = [
        {"prompt": "What is 1 + 2?", "params": {"max_tokens": 2, "logprobs": 2}},
        {"prompt": "What is 1 + 2?", "sampling_params": {"temperature": 0.9, "seed": 5, "n": 2}},
    ]
    job(rows_file(rows))
    first, second = read_rows(tmp_path / "out")
    expected = demo.generate(rows[0]["prompt"], SamplingParams(temperature=0.0, max_tokens=2, logprobs=2))[0].outputs[0]
    assert first["generated_text"] == expected.text
    assert [[entry["token_id"] for entry in token] for token in first["logprobs"]] == [
        list(d) for d in expected.logprobs
    ]
    total = sum(token[0]["logprob"] for token in first["logprobs"])
    assert total == pytest.approx(expected.cumulative_logprob, abs=1e-5)
    params = SamplingParams(temperature=0.9, seed=5, n=2, **SHORT)
    both = demo.generate(rows[1]["prompt"], params)[0].outputs
    assert second["generated_text"] == [completion.text for completion in both]
    assert second["finish_reason"] == [completion.finish_reason for completion in both]
    assert second["generated_tokens"] == sum(len(completion.token_ids) for completion in both)


BROKEN = {
    b'{"prompt": "x"\n': "JSON",
    b"[1, 2]\n": "must be an object",
    b'{"question": "x"}\n': "prompt",
    b'{"prompt": 7}\n': "prompt",
    b'{"prompt": "x", "params": {"temperature": -1}}\n': "temperature",
    b'{"prompt": "x", "params": {"heat": 1}}\n': "heat",
    b'{"prompt": "\xff"}\n': "UTF-8",
    b'{"prompt": "x", "messages": []}\n': "messages",
    b'{"prompt": ""}\n': "empty",
    json.dumps({"prompt": "many " * 300}).encode() + b"\n": "max_model_len",
    b'{"prompt_token_ids": [1, 99999]}\n': "99999",
    b'{"prompt": "x", "error": "mine"}\n': "'error'",
}


def test_broken_rows(demo, job, rows_file, tmp_path):
    """One row in forty is broken, each in another way: it says why, and the others are what they would be."""
    rows = [{"prompt": f"What is {i % 40} + {i % 7}?", "id": i} for i in range(40 * len(BROKEN))]
    places = {40 * i + 17 + i: line for i, line in enumerate(BROKEN)}
    source = rows_file([places.get(i, row) for i, row in enumerate(rows)])
    summary = job(source, sampling_params={"max_tokens": 2}, rows_per_part=100)
    got = read_rows(tmp_path / "out")
    assert (summary.rows, summary.errors) == (len(rows), len(BROKEN))
    texts = {}
    for i, row in enumerate(got):
        if i in places:
            assert f"rows.jsonl:{i + 1}: " in row["error"]
            assert BROKEN[places[i]] in row["error"]
            assert "\n" not in row["error"]
            assert row["generated_text"] is None
        else:
            assert row["error"] is None
            assert row["id"] == i
            texts[rows[i]["prompt"]] = row["generated_text"]
    outputs = demo.generate(list(texts), SamplingParams(temperature=0.0, max_tokens=2))
    assert [output.outputs[0].text for output in outputs] == list(texts.values())


def test_images(job, rows_file, tmp_path):
    """What the model has and what is not loaded of it is known when it is."""
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    assert job(rows_file([{"messages": messages}]), task="chat").errors == 1
    (row,) = read_rows(tmp_path / "out")
    assert "rows.jsonl:1: messages[0]: content has a part of type 'image_url'; only text is" in row["error"]
    assert row["error"].endswith(": llama is a text model")


def test_too_many_errors(job, rows_file, tmp_path):
    rows = [*QUESTIONS, {}, b"no\n", {"prompt": 1}]
    with pytest.raises(TooManyErrors, match=r"3 rows have errors, and max_errors is 2; the last: .*rows\.jsonl:28"):
        job(rows_file(rows), max_errors=2)
    assert all(content.count(b"\n") == 10 for content in files(tmp_path / "out").values())
    assert job(rows_file(rows), max_errors=3).errors == 3  # goes on


def test_seeds(job, rows_file, tmp_path):
    rows = [{"prompt": "Once", "params": {"temperature": 1.5}} for _ in range(24)]
    hot = {"sampling_params": {"max_tokens": 8}}
    job(rows_file(rows), **hot)
    texts = [row["generated_text"] for row in read_rows(tmp_path / "out")]
    assert len(set(texts)) > 12  # the same prompt, and each row is drawn anew
    # Alone, or in other company, a row's text is the same.
    for i in range(3):
        job(rows_file(rows), f"shard{i}", shard=f"{i}/3", rows_per_part=1, **hot)
    merge(*(tmp_path / f"shard{i}" for i in range(3)))
    assert [row["generated_text"] for row in read_rows(tmp_path / "shard0")] == texts


def test_another_seed(rows_file, tmp_path):
    rows = [{"prompt": "Once", "params": {"temperature": 1.5}} for _ in range(4)]
    texts = []
    for seed in (0, 1):
        options = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "seed": seed}
        run(rows_file(rows), tmp_path / str(seed), model=MODEL_DIR, sampling_params={"max_tokens": 8}, **options)
        texts.append([row["generated_text"] for row in read_rows(tmp_path / str(seed))])
    assert texts[0] != texts[1]


@pytest.mark.parametrize("broken", [False, True])
def test_a_straggler_does_not_fill_the_memory(demo, job, rows_file, tmp_path, monkeypatch, broken):
    """While the first row runs, no more than so many others are begun, or found to be broken."""
    rows = [{"prompt": "Once", "params": {"max_tokens": 200, "ignore_eos": True}}]
    rows += [{} if broken else {"prompt": f"What is {i}?", "params": {"max_tokens": 1}} for i in range(300)]
    rows += [{"prompt": "Once", "params": {"max_tokens": 1}}]
    held = []
    put = loop.Loop._put
    monkeypatch.setattr("jaxinfer.batch.order.ROWS", 8)
    monkeypatch.setattr(loop, "ROWS", 1)

    def watched(self, *arguments):
        put(self, *arguments)
        held.append(self._held)
        assert self.max_held == 16 + 2 * 10

    monkeypatch.setattr(loop.Loop, "_put", watched)
    job(rows_file(rows))
    assert max(held) <= 36 + 1 + 2 * 8
    assert [row["generated_tokens"] for row in read_rows(tmp_path / "out")] == [200] + [None if broken else 1] * 300 + [
        1
    ]


def test_prompts_that_are_too_long(demo, job, rows_file, tmp_path):
    context = demo.sizes.max_model_len
    long = "many " * 300 + "words"
    job(rows_file([{"prompt": long}, {"prompt": "short"}]), truncate=True)
    ids = demo.tokenizer.encode(long)
    kept = [*ids[:1], *ids[len(ids) - (context - 6) + 1 :]]
    assert (len(kept), kept[0]) == (context - 6, demo.tokenizer.bos_token_id)
    expected = demo.generate(kept, SamplingParams(temperature=0.0, **SHORT))[0]
    first, second = read_rows(tmp_path / "out")
    assert (first["generated_text"], first["prompt_tokens"]) == (expected.outputs[0].text, context - 6)
    assert second["error"] is None
    job(rows_file([{"text": long}, {"prompt": long, "continuation": " again"}]), "scored", task="score", truncate=True)
    text, pair = read_rows(tmp_path / "scored")
    scores = demo.score([[ids[0], *ids[-context:]]])
    assert text["logprob"] == pytest.approx(scores[0].logprob)
    assert (text["tokens"], text["word_perplexity"]) == (context, None)
    assert pair["error"] is None


def test_chat_and_openai_lines(demo, job, rows_file, tmp_path):
    messages = [{"role": "user", "content": "What is 1 + 2?"}]
    body = {"model": "m", "messages": messages, "max_completion_tokens": 6, "temperature": 0}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    bad = line | {"custom_id": "b", "body": body | {"temperature": -1}}
    huge = line | {"custom_id": "c", "body": body | {"messages": [{"role": "user", "content": "many " * 300}]}}
    summary = job(rows_file([{"messages": messages}, line, bad, huge]), task="chat")
    plain, good, refused, long = read_rows(tmp_path / "out")
    text = demo.chat(messages, SamplingParams(temperature=0.0, **SHORT))[0].outputs[0].text
    assert plain["generated_text"] == text
    assert (good["custom_id"], good["response"]["status_code"]) == ("a", 200)
    assert good["response"]["body"]["choices"][0]["message"]["content"] == text
    assert (refused["custom_id"], refused["response"]["status_code"]) == ("b", 400)
    assert (long["custom_id"], long["response"]["status_code"]) == ("c", 400)
    assert "max_model_len" in json.dumps(long)
    assert summary.errors == 2
    job(rows_file([line, {"messages": messages}]), "parquet", task="chat", format="parquet")
    refused, plain = read_rows(tmp_path / "parquet")
    assert "OpenAI" in refused["error"]
    assert plain["generated_text"] == text


def test_scores(demo, job, rows_file, tmp_path):
    rows = [{"text": "What is 1 + 2?", "id": 7}, {"prompt": "1 + 2 =", "continuation": " 3"}, {"text": ""}]
    summary = job(rows_file(rows), "out.parquet", task="score", sampling_params=None, token_ids=True)
    text, pair, empty = read_rows(tmp_path / "out.parquet")
    for row, expected in ((text, demo.score("What is 1 + 2?")[0]), (pair, demo.score("1 + 2 =", " 3")[0])):
        assert row["error"] is None
        assert row["logprob"] == pytest.approx(expected.logprob, abs=1e-5)
        assert row["token_logprobs"] == pytest.approx(expected.logprobs, abs=1e-5)
        assert (row["token_ids"], row["tokens"]) == (expected.token_ids, len(expected.token_ids))
        assert row["is_greedy"] == expected.is_greedy
        for name in ("perplexity", "word_perplexity", "byte_perplexity"):
            assert row[name] == pytest.approx(getattr(expected, name), rel=1e-5)
    assert "rows.jsonl:3" in empty["error"]
    assert text["id"] == 7
    assert (summary.rows, summary.errors, summary.generated_tokens) == (3, 1, 0)
    scores = [*demo.score("What is 1 + 2?"), *demo.score("1 + 2 =", " 3")]
    assert summary.prompt_tokens == sum(len(score.token_ids) + score.num_prompt_tokens for score in scores)
    assert summary.tokens_per_second > 0


def test_parameters_called_anything(job, rows_file, tmp_path):
    """What a row says can't reach Python's own names."""
    rows = [{"prompt": "x", "params": {name: 1}} for name in ("self", "cls", "given", "")]
    assert job(rows_file([*rows, {"prompt": "x"}])).errors == 4
    *wrong, right = read_rows(tmp_path / "out")
    assert right["error"] is None
    assert ["is not supported" in row["error"] for row in wrong] == [True] * 4


def test_log_probabilities_of_the_prompt(demo, job, rows_file, tmp_path):
    row = {"prompt": "What is 1 + 2?", "params": {"max_tokens": 1, "prompt_logprobs": 1, "n": 2}}
    job(rows_file([row]))
    (got,) = read_rows(tmp_path / "out")
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
    first, *expected = demo.generate(row["prompt"], params)[0].prompt_logprobs
    assert got["prompt_logprobs"][0] is first is None
    for step, wanted in zip(got["prompt_logprobs"][1:], expected, strict=True):
        assert [(entry["token_id"], entry["token"], entry["rank"]) for entry in step] == [
            (i, logprob.decoded_token, logprob.rank) for i, logprob in wanted.items()
        ]
        assert [entry["logprob"] for entry in step] == pytest.approx(
            [logprob.logprob for logprob in wanted.values()], abs=1e-5
        )
    job(rows_file([row]), "out.parquet", sampling_params=SHORT | {"prompt_logprobs": 0, "n": 2})
    assert json.loads(read_rows(tmp_path / "out.parquet")[0]["prompt_logprobs"]) == got["prompt_logprobs"]


def test_a_template_for_columns_that_are_not_there(job, rows_file, tmp_path):
    (tmp_path / "rows.csv").write_text("question,id\nWhat?,1\n")
    (tmp_path / "rows.txt").write_text("What?\n")
    pq.write_table(pa.table({"question": ["What?"]}), tmp_path / "rows.parquet")
    rows_file([b"broken\n", *QUESTIONS])
    for name in ("rows.csv", "rows.txt", "rows.parquet", "rows.jsonl"):
        with pytest.raises(ValueError, match=rf"{name}: no column 'qestion', which the prompt template takes; th"):
            job([tmp_path / name], prompt_template="Q: {qestion}")
    assert not (tmp_path / "out").exists()
    rows = [{"prompt": "x"}] * 5 + [{"question": "What?"}]
    assert job(rows_file(rows), prompt_template="{question}").errors == 5  # some have it


def test_empty_lines_of_text_are_rows(job, tmp_path):
    (tmp_path / "rows.txt").write_text("What is 1 + 2?\n\nWhat is 2 + 3?\n")
    summary = job(tmp_path / "rows.txt")
    rows = read_rows(tmp_path / "out")
    assert [row["text"] for row in rows] == ["What is 1 + 2?", "", "What is 2 + 3?"]
    assert [row["error"] and row["error"].removeprefix(f"{tmp_path}/") for row in rows] == [
        None,
        "rows.txt:2: text is empty",
        None,
    ]
    assert summary.errors == 1


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"task": "sum"}, ["task", "'sum'", "score"]),
        ({"rows_per_part": 0}, ["rows_per_part is 0"]),
        ({"max_errors": -1}, ["max_errors is -1"]),
        ({"shard": "4/4"}, ["'4/4'", "0 to N-1"]),
        ({"prompt_template": "{a.b}"}, ["prompt"]),
        ({"sampling_params": {"temperature": -1}}, ["temperature is -1"]),
        ({"dtype": "float32"}, ["'dtype'", "LLM already"]),
    ],
)
def test_options_that_make_no_sense(job, rows_file, tmp_path, options, facts):
    with pytest.raises(ValueError) as error:
        job(rows_file(QUESTIONS), **options)
    assert all(fact in str(error.value) for fact in facts), error.value
    assert not (tmp_path / "out").exists()


def test_odd_names(demo, rows_file, tmp_path, monkeypatch):
    """Of outputs, which are inputs then."""
    monkeypatch.chdir(tmp_path)
    source = rows_file([{"prompt": "1 + 1"}] * 3)
    for name in ("run[1]", "x/.", "y[2].jsonl"):
        for _ in range(2):
            assert run(source, name, model=demo, sampling_params={"max_tokens": 1}, output_prefix=name[0]).rows == 3
        source = name
