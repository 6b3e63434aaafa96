"""Jobs on the packaged model, within this process."""

import csv
import dataclasses
import errno
import gzip
import json
import os
import shutil

import pytest

from jaxinfer import LLM, SamplingParams
from jaxinfer.batch import TooManyErrors, loop, manifest, merge, run
from jaxinfer.demo import MODEL_DIR
from tests.batch.conftest import read_rows

QUESTIONS = [{"prompt": f"What is {i} + {i + 7}?", "id": i} for i in range(25)]
SHORT = {"max_tokens": 6}


@pytest.fixture
def job(demo, tmp_path):
    """Runs a job of ten rows a part; returns what it says."""

    def start(source, output="out", **options):
        given = {"model": demo, "sampling_params": SHORT, "rows_per_part": 10} | options
        return run(source, tmp_path / output, **given)

    return start


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("part-*"))}


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
    assert [[one["token_id"] for one in token] for token in first["logprobs"]] == [list(d) for d in expected.logprobs]
    total = sum(token[0]["logprob"] for token in first["logprobs"])
    assert total == pytest.approx(expected.cumulative_logprob, abs=1e-5)
    params = SamplingParams(temperature=0.9, seed=5, n=2, **SHORT)
    both = demo.generate(rows[1]["prompt"], params)[0].outputs
    assert second["generated_text"] == [one.text for one in both]
    assert second["finish_reason"] == [one.finish_reason for one in both]
    assert second["generated_tokens"] == sum(len(one.token_ids) for one in both)


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
    """One row in a hundred is broken, each in another way: it says why, and the others are what they would be."""
    rows = [{"prompt": f"What is {i % 40} + {i % 7}?", "id": i} for i in range(100 * len(BROKEN))]
    places = {100 * i + 37 + i: line for i, line in enumerate(BROKEN)}
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


def test_complete(job, rows_file, tmp_path, monkeypatch):
    first = job(rows_file(QUESTIONS))
    before = files(tmp_path / "out")
    monkeypatch.setattr(loop.Loop, "run", lambda *_: 1 / 0)
    again = job(rows_file(QUESTIONS))
    assert again == dataclasses.replace(
        first, rows_now=0, seconds=0.0, tokens_per_second=0.0, device_share=0.0, cache_hit_rate=0.0
    )
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"sampling_params": {"max_tokens": 7}}, ["sampling_params.max_tokens was 6 and is 7"]),
        ({"sampling_params": SHORT | {"top_k": 3}}, ["sampling_params.top_k was null and is 3"]),
        ({"prompt_template": "{prompt}!"}, ['prompt_template was null and is "{prompt}!"']),
        ({"rows_per_part": 5, "token_ids": True}, ["rows_per_part was 10 and is 5", "token_ids was false and is true"]),
        ({"task": "chat"}, ['task was "generate" and is "chat"']),
        ({"shard": "0/2"}, ["--shard 0/2", "_manifest.json"]),
        ({"format": "parquet"}, ['format was "jsonl" and is "parquet"']),
    ],
)
def test_another_job(job, rows_file, tmp_path, changes, facts):
    stops = iter([False] * 40)
    source = rows_file(QUESTIONS)
    assert not job(source, stop=lambda: next(stops, True)).complete
    before = files(tmp_path / "out")
    with pytest.raises(ValueError) as error:
        job(source, **changes)
    assert all(fact in str(error.value) for fact in [*facts, str(tmp_path / "out")])
    assert files(tmp_path / "out") == before


def test_another_model(job, rows_file, tmp_path):
    stops = iter([False] * 40)
    source = rows_file(QUESTIONS)
    assert not job(source, stop=lambda: next(stops, True)).complete
    with (
        LLM(MODEL_DIR, max_model_len=100) as shorter,
        pytest.raises(ValueError, match="max_model_len was 256 and is 100"),
    ):
        job(source, model=shorter)
    copied = tmp_path / "model"
    shutil.copytree(MODEL_DIR, copied)
    settings = json.loads((copied / "generation_config.json").read_text())
    (copied / "generation_config.json").write_text(json.dumps(settings | {"temperature": 0.5}))
    with pytest.raises(ValueError, match="model was "):
        job(source, model=copied)


def test_a_file_that_changed(job, rows_file, tmp_path):
    stops = iter([False] * 40)
    source = rows_file(QUESTIONS)
    assert not job(source, stop=lambda: next(stops, True)).complete
    before = files(tmp_path / "out")
    content = source.read_bytes()
    source.write_bytes(content.replace(b"What", b"Whit"))
    with pytest.raises(ValueError, match=r"rows\.jsonl has changed since \(it had \d+ bytes, and has \d+\)"):
        job(source)
    with pytest.raises(ValueError, match=r"other\.jsonl is new"):
        job([rows_file(QUESTIONS, "other.jsonl"), rows_file(QUESTIONS)])
    assert files(tmp_path / "out") == before
    source.write_bytes(content)
    assert job(source).complete
    job(source, "uninterrupted")
    assert files(tmp_path / "out") == files(tmp_path / "uninterrupted")


def test_going_on_after_a_full_disk(job, rows_file, tmp_path, monkeypatch):
    source = rows_file(QUESTIONS)
    job(source, "expected")
    fsync, calls = os.fsync, iter(range(100))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fails_later(fd):
        if next(calls) == 6:  # of the manifest, a part, its manifest, the next part: file and folder each
            raise full
        fsync(fd)

    monkeypatch.setattr(os, "fsync", fails_later)
    with pytest.raises(OSError, match=r"part-00001\.jsonl: can't be written \(No space left on device\)"):
        job(source)
    assert sorted(os.listdir(tmp_path / "out")) == ["_manifest.json", "part-00000.jsonl"]
    assert job(source).rows_now == 15
    assert files(tmp_path / "out") == files(tmp_path / "expected")


def test_a_damaged_file(job, rows_file, tmp_path):
    source = tmp_path / "rows.jsonl.gz"
    whole = gzip.compress(
        b"".join(json.dumps(row).encode() + os.urandom(9).hex().encode() + b"\n" for row in QUESTIONS)
    )
    source.write_bytes(whole[:-200])
    with pytest.raises(OSError, match=r"rows\.jsonl\.gz: can't be read on"):
        job(source)
    assert not (tmp_path / "out/part-00002.jsonl").exists()


def test_stopping(job, rows_file, tmp_path):
    source = rows_file(QUESTIONS)
    job(source, "expected")
    for asked in (0, 1, 30, 60):
        stops = iter([False] * asked)
        summary = job(source, f"out{asked}", stop=lambda stops=stops: next(stops, True))
        if asked < 60:
            assert (summary.rows, summary.complete) == (10 if asked else 0, False)  # the part that was the next one
        assert job(source, f"out{asked}").complete
        assert files(tmp_path / f"out{asked}") == files(tmp_path / "expected")


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
    assert summary.prompt_tokens == sum(len(one.token_ids) + one.num_prompt_tokens for one in scores)
    assert summary.tokens_per_second > 0


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_one_file(job, rows_file, tmp_path, monkeypatch, name):
    source = rows_file(QUESTIONS)
    job(source, "parts", format=name.split(".")[1])
    write = manifest.Manifest.write

    def killed_before_the_end(self, output, path):
        if path.endswith(f"{name}.manifest.json"):
            raise KeyboardInterrupt
        write(self, output, path)

    monkeypatch.setattr(manifest.Manifest, "write", killed_before_the_end)
    with pytest.raises(KeyboardInterrupt):
        job(source, name)
    monkeypatch.setattr(manifest.Manifest, "write", write)
    assert job(source, name).complete
    assert job(source, name).rows == 25
    assert read_rows(tmp_path / name) == read_rows(tmp_path / "parts")
    assert sorted(os.listdir(tmp_path)) == [name, f"{name}.manifest.json", "parts", "rows.jsonl"]
    with pytest.raises(ValueError, match="max_tokens was 6"):
        job(source, name, sampling_params={"max_tokens": 7})
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="is gone"):
        job(source, name)


def test_columns_of_parquet_that_drift(job, rows_file, tmp_path):
    """Columns are those of the first part; what comes later is not lost and ends nothing."""
    rows = [{"prompt": "x", "a": 1} for _ in range(10)] + [{"prompt": "x", "a": 1.5, "b": [2]}, {"prompt": "x"}]
    stops = iter([False] * 14)
    assert not job(rows_file(rows), format="parquet", stop=lambda: next(stops, True)).complete
    job(rows_file(rows), format="parquet")
    got = read_rows(tmp_path / "out")
    assert [row["a"] for row in got] == [1] * 10 + [None] * 2
    assert [row.get("other_columns") for row in got] == [None] * 10 + ['{"a": 1.5, "b": [2]}', None]
    assert "other_columns" not in got[0]
    for format in ("parquet", "csv", "csv.gz"):
        job(rows_file(rows), f"out.{format}")
    assert read_rows(tmp_path / "out.parquet") == [{"other_columns": None, **row} for row in got]
    with (
        open(tmp_path / "out.csv", newline="") as plain,
        gzip.open(tmp_path / "out.csv.gz", "rt", newline="") as packed,
    ):
        table, same = (list(csv.DictReader(file, strict=True)) for file in (plain, packed))
    assert table == same
    assert [row["generated_text"] for row in table] == [row["generated_text"] for row in got]
    assert [(row["a"], row["other_columns"]) for row in table] == [("1", "")] * 10 + [("1.5", '{"b": [2]}'), ("", "")]


def test_no_rows(job, rows_file, tmp_path):
    for name in ("out", "out.jsonl", "out.parquet"):
        summary = job(rows_file([]), name)
        assert (summary.complete, summary.rows) == (True, 0)
    assert files(tmp_path / "out") == {"part-00000.jsonl": b""}
    assert (tmp_path / "out.jsonl").read_bytes() == b""
    assert read_rows(tmp_path / "out.parquet") == []


def test_a_store_of_objects(job, rows_file, tmp_path, demo):
    import fsspec

    source = rows_file(QUESTIONS)
    job(source)
    stops = iter([False] * 40)
    options = {"model": demo, "sampling_params": SHORT, "rows_per_part": 10}
    assert not run(source, "memory://job-test/out", stop=lambda: next(stops, True), **options).complete
    assert run(source, "memory://job-test/out", **options).complete
    fs = fsspec.filesystem("memory")
    assert {os.path.basename(p): fs.cat_file(p) for p in fs.glob("/job-test/out/part-*")} == files(tmp_path / "out")
    assert run(source, "memory://job-test/out.jsonl", **options).complete
    assert fs.cat_file("/job-test/out.jsonl") == b"".join(files(tmp_path / "out").values())
    assert not fs.exists("/job-test/out.jsonl.parts")


def test_outputs_of_somebody_else(job, rows_file, tmp_path):
    source = rows_file(QUESTIONS)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("mine")
    (tmp_path / "out.jsonl").write_text("mine")
    with pytest.raises(ValueError, match=r"not of a batch job \(thesis\.tex\)"):
        job(source)
    with pytest.raises(ValueError, match="is there already"):
        job(source, "out.jsonl")
    assert os.listdir(tmp_path / "out") == ["thesis.tex"]
    assert (tmp_path / "out.jsonl").read_text() == "mine"


def test_a_part_that_is_gone(job, rows_file, tmp_path):
    job(rows_file(QUESTIONS))
    (tmp_path / "out/part-00001.jsonl").unlink()
    with pytest.raises(ValueError, match=r"part-00001\.jsonl: is gone"):
        job(rows_file(QUESTIONS))
    (tmp_path / "out/_manifest.json").write_text("{}")
    with pytest.raises(ValueError, match=r"_manifest\.json: not a manifest"):
        job(rows_file(QUESTIONS))


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"task": "embed"}, ["task", "'embed'", "score"]),
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


def test_rows_that_were_generated_can_be_scored(job, rows_file, tmp_path):
    """The error of a row that was served is null, and no obstacle."""
    rows = [{"prompt": "one", "continuation": " two", "error": e} for e in (None, "why")]
    summary = job(rows_file(rows), task="score", sampling_params=None)
    assert (summary.rows, summary.errors) == (2, 1)
    right, wrong = read_rows(tmp_path / "out")
    assert right["error"] is None
    assert "has a column 'error'" in wrong["error"]
