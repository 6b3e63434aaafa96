"""Jobs that make vectors and classes of texts: what LLM.embed and LLM.classify give, whatever happens in between."""

import base64
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxinfer import LLM
from jaxinfer.batch import run
from jaxinfer.batch.manifest import AnotherJob
from jaxinfer.batch.ray import Predictor
from tests.batch.conftest import after_a_part, files, read_rows
from tests.models.references import found_or_made
from tests.refusals import line
from tests.test_classify import make as make_classifier
from tests.test_embed import make as make_embedder

SIZES = {"max_num_batched_tokens": 256}
TEXTS = ["one two", "three", "a longer text of some more words", "two one", "x" * 300, *map(str, range(20))]
SERVED = [i for i in range(len(TEXTS)) if i != 4]  # which has more tokens than the model takes


@pytest.fixture(scope="module")
def folders(checkpoints):
    return {
        "bert": found_or_made(checkpoints.root / "sentences", "bert", "large", make_embedder("bert")),
        **{
            kind: found_or_made(checkpoints.root / "classes", kind, "large", make_classifier(kind))
            for kind in ("single", "one")
        },
    }


@pytest.fixture(scope="module")
def bert(folders):
    with LLM(folders["bert"], **SIZES) as llm:
        yield llm


@pytest.fixture(scope="module")
def single(folders):
    with LLM(folders["single"], **SIZES) as llm:
        yield llm


@pytest.fixture
def source(rows_file):
    return rows_file({"id": i, "text": text} for i, text in enumerate(TEXTS))


def vectors(llm, texts, **options):
    return [output.outputs.embedding for output in llm.embed(texts, use_tqdm=False, **options)]


def test_vectors_as_parquet(bert, source, tmp_path):
    pooling = {"prompt_name": "query", "dimensions": 32}
    options = {"model": bert, "task": "embed", "pooling_params": pooling, "rows_per_part": 10}
    summary = run(source, tmp_path / "out.parquet", **options)
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 32)
    rows = table.to_pylist()
    assert [row["id"] for row in rows] == list(range(len(TEXTS)))
    expected = vectors(bert, [TEXTS[i] for i in SERVED], **pooling)
    for i, vector in zip(SERVED, expected, strict=True):
        np.testing.assert_array_equal(np.float32(rows[i]["embedding"]), vector)
    assert rows[4]["embedding"] is None
    assert "rows.jsonl:5: the text has 308 tokens" in rows[4]["error"]
    assert (summary.rows, summary.errors, summary.generated_tokens) == (len(TEXTS), 1, 0)
    assert summary.prompt_tokens == sum(row["tokens"] or 0 for row in rows) > 0
    assert summary.tokens_per_second > 0
    run(source, tmp_path / "cut", truncate=True, **options)
    (cut,) = vectors(bert, TEXTS[4], truncate=True, **pooling)
    np.testing.assert_array_equal(np.float32(read_rows(tmp_path / "cut")[4]["embedding"]), cut)


def test_going_on_and_other_jobs(bert, folders, source, tmp_path):
    options = {"task": "embed", "rows_per_part": 5}
    run(source, tmp_path / "whole", model=bert, **options)
    out = tmp_path / "out"
    stopped = run(source, out, model=bert, stop=after_a_part(), **options)
    assert 0 < stopped.rows < len(TEXTS)
    assert "pooling_params.dimensions was null and is 8" in line(
        lambda: run(source, out, model=bert, pooling_params={"dimensions": 8}, **options), AnotherJob
    )
    pooled = {"pooler_config": {"pooling_type": "CLS"}} | SIZES
    assert "pooler was" in line(lambda: run(source, out, model=folders["bert"], **options, **pooled), AnotherJob)
    run(source, out, model=bert, **options)
    assert files(out) == files(tmp_path / "whole")
    for i in range(2):
        run(source, tmp_path / "shards", model=bert, shard=f"{i}/2", **options)
    assert files(tmp_path / "shards") == files(out)
    copy = tmp_path / "copy"
    shutil.copytree(folders["bert"], copy)
    (copy / "1_Pooling" / "config.json").write_text('{"pooling_mode": "max"}')
    assert "model was" in line(lambda: run(source, out, model=copy, **options), AnotherJob)


def test_lists_of_numbers(bert, source, tmp_path):
    """JSON Lines and CSV have the same float32."""
    expected = vectors(bert, TEXTS[0])[0].tolist()
    run(source, tmp_path / "out.jsonl", model=bert, task="embed")
    run(source, tmp_path / "out.csv", model=bert, task="embed")
    as_json = read_rows(tmp_path / "out.jsonl")[0]["embedding"]
    assert np.float32(as_json).tolist() == expected
    assert len(json.dumps(as_json)) < 14 * len(as_json)
    assert json.dumps(as_json) in (tmp_path / "out.csv").read_text()


def test_classes(single, rows_file, tmp_path):
    rows = [
        {"text": "a"},
        {"text": "one text", "text_pair": "and another"},
        {"text": "", "text_pair": "b"},
        {"prompt_token_ids": [1, 2, 3]},
        {"text": ""},
        {"prompt_token_ids": [1], "text_pair": "b"},
        {"text": "a", "params": {"n": 2}},
    ]
    expected = single.classify(["a", ("one text", "and another"), ("", "b"), [1, 2, 3]], use_tqdm=False)
    source = rows_file(rows)
    run(source, tmp_path / "out.parquet", model=single, task="classify")
    run(source, tmp_path / "logits", model=single, task="classify", pooling_params={"use_activation": False})
    got, logits = read_rows(tmp_path / "out.parquet"), read_rows(tmp_path / "logits")
    for row, raw, output in zip(got, logits, expected, strict=False):
        assert (row["label"], row["error"], row["tokens"]) == (output.outputs.label, None, len(output.prompt_token_ids))
        assert row["probs"] == output.outputs.probs.tolist()
        assert "probs" not in raw
        assert np.exp(raw["logits"]) / np.exp(raw["logits"]).sum() == pytest.approx(row["probs"], abs=1e-6)
    assert [row["error"].partition(": ")[2] for row in got[4:]] == [
        "text is empty",
        "has both prompt_token_ids and text_pair: a pair is of two texts",
        "sampling parameters are for what is generated, and nothing is here: leave params out",
    ]


def test_openai_lines(bert, rows_file, tmp_path):
    def embeddings(i, **body):
        return {"custom_id": str(i), "method": "POST", "url": "/v1/embeddings", "body": {"model": "m"} | body}

    bodies = [
        {"input": "one two"},
        {"input": ["one two", "three"], "encoding_format": "base64", "dimensions": 8, "user": "u"},
        {"input": [1, 2, 3]},
        {"input": [[1, 2, 3], "three"]},
    ]
    refused = {
        "input is empty": {"input": ""},
        "is a list without any": {"input": []},
        "input must be a list of token ids": {"input": [[]]},
        "encoding_format is 'int8'": {"input": "a", "encoding_format": "int8"},
        "dimensions: 900 is not from 1 to 128": {"input": "a", "dimensions": 900},
        "'temperature' is not supported": {"input": "a", "temperature": 0.5},
        "the text has 308 tokens": {"input": ["a", "x" * 307]},
    }
    rows = [embeddings(i, **body) for i, body in enumerate([*bodies, *refused.values()])]
    summary = run(rows_file(rows), tmp_path / "out", model=bert, task="embed")
    got = read_rows(tmp_path / "out")
    assert [row["custom_id"] for row in got] == [str(i) for i in range(len(rows))]
    assert summary.errors == len(refused)
    for row, why in zip(got[len(bodies) :], refused, strict=True):
        assert row["response"]["status_code"] == 400
        assert why in row["response"]["body"]["error"]["message"]
    (one, three), (ids,) = vectors(bert, ["one two", "three"]), vectors(bert, [1, 2, 3])
    first, second, third, fourth = (row["response"]["body"] for row in got[: len(bodies)])
    usage = {"prompt_tokens": 8, "total_tokens": 8}
    data = first.pop("data")
    assert first == {"object": "list", "model": bert.folder.name, "usage": usage}
    np.testing.assert_array_equal(np.float32(data[0].pop("embedding")), one)
    assert data == [{"object": "embedding", "index": 0}]
    assert second["usage"]["prompt_tokens"] == 8 + 6
    cut = vectors(bert, ["one two", "three"], dimensions=8)
    for entry, vector in zip(second["data"], cut, strict=True):
        np.testing.assert_array_equal(np.frombuffer(base64.b64decode(entry["embedding"]), "<f4"), vector)
    assert [entry["index"] for entry in second["data"]] == [0, 1]
    for body, expected in ((third, [ids]), (fourth, [ids, three])):
        np.testing.assert_array_equal(np.float32([entry["embedding"] for entry in body["data"]]), expected)


def test_what_is_refused(bert, single, source, tmp_path):
    def refused(**options):
        return line(lambda: run(source, tmp_path / "out", **options), ValueError)

    assert "use_activation is nothing for the task embed: it is of the task classify" in refused(
        model=bert, task="embed", pooling_params={"use_activation": True}
    )
    assert "pooling_params: dimensions is nothing for the task generate" in refused(
        model=bert, pooling_params={"dimensions": 3}
    )
    assert "max_tokens: nothing is sampled by the task embed" in refused(
        model=bert, task="embed", sampling_params={"max_tokens": 3}
    )
    assert "token_ids are not written by the task embed" in refused(model=bert, task="embed", token_ids=True)
    assert "dimensions: 500 is not from 1 to 128" in refused(
        model=bert, task="embed", pooling_params={"dimensions": 500}
    )
    assert "'passage' is no prompt" in refused(model=bert, task="embed", pooling_params={"prompt_name": "passage"})
    assert "gives texts classes" in refused(model=single, task="embed")
    assert "makes vectors of texts" in refused(model=bert, task="generate")


def test_a_predictor_gives_the_same(bert, folders, tmp_path):
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "rows.parquet")
    run(tmp_path / "rows.parquet", tmp_path / "out.parquet", model=bert, task="embed")
    predict = Predictor(folders["bert"], task="embed", **SIZES)
    got = predict(pq.read_table(tmp_path / "rows.parquet"))
    expected = pq.read_table(tmp_path / "out.parquet")
    assert got.drop_columns("error").equals(expected.drop_columns("error"))
    predict.worker.llm.close()


DOCUMENTS = ["three", "one two", "x" * 40, "one"]


def test_ranking(bert, folders, rows_file, tmp_path):
    """By the similarity of vectors, and by a model that reads both texts."""
    refused = {
        "documents must be a list of texts, and is a list without any": {"query": "a", "documents": []},
        "documents[1] must be text": {"query": "a", "documents": ["a", 2]},
        "query is empty": {"query": "", "documents": ["a"]},
        "query must be text, and is null": {"text": "a"},
        "the text has 308 tokens": {"query": "a", "documents": ["a", "x" * 307]},
    }
    rows = [{"id": 0, "query": "one", "documents": DOCUMENTS}, *refused.values()]
    source = rows_file(rows)
    with LLM(folders["one"], **SIZES) as cross:
        for name, llm in {"vectors": bert, "pairs": cross}.items():
            run(source, tmp_path / f"{name}.parquet", model=llm, task="rerank", pooling_params={"top_n": 3})
            first, *others = read_rows(tmp_path / f"{name}.parquet")
            expected = llm.rerank("one", DOCUMENTS, top_n=3, use_tqdm=False)
            assert first["ranking"] == [entry.index for entry in expected]
            assert first["relevance_scores"] == [entry.relevance_score for entry in expected]
            assert first["tokens"] > len("".join(DOCUMENTS))
            for row, why in zip(others, refused, strict=True):
                if name == "vectors" or "tokens" not in why:
                    assert why in row["error"]
    assert "top_n" in line(
        lambda: run(source, tmp_path / "out", model=bert, task="rerank", pooling_params={"top_n": 0}), ValueError
    )
