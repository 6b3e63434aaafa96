"""`jaxinfer embed`, `classify` and `rerank`."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from jaxinfer import LLM
from jaxinfer.tasks.similarity import quantized
from tests.models.references import found_or_made
from tests.test_classify import make as make_classifier
from tests.test_embed import make as make_embedder

TEXTS = ["one two", "three"]
ROWS = b'{"text": "one two", "id": 7, "tokens": 5}\n{"text": ""}\n{"text": "three", "id": 8}\n'


@pytest.fixture(scope="module")
def bert(checkpoints):
    return found_or_made(checkpoints.root / "sentences", "bert", "large", make_embedder("bert"))


@pytest.fixture(scope="module")
def single(checkpoints):
    return found_or_made(checkpoints.root / "classes", "single", "large", make_classifier("single"))


@pytest.fixture(scope="module")
def vectors(bert):
    """Of TEXTS, with the checkpoint's prompt, and cut."""
    with LLM(bert) as llm:
        outputs = llm.embed(TEXTS, prompt_name="query", dimensions=8, use_tqdm=False)
    return np.stack([output.outputs.embedding for output in outputs])


def test_vectors(cli, bert, vectors, tmp_path):
    command = ["-m", bert, "--prompt-name", "query", "--dimensions", 8]
    code, out, err = cli("embed", *TEXTS, *command)
    assert (code, err) == (0, "")
    head, *lines = out.splitlines()
    assert head.split() == ["tokens", "dimensions", "vector"]
    begun = ", ".join(f"{number:.4f}" for number in vectors[0][:4])
    assert lines[0].split(maxsplit=2) == ["15", "8", f"[{begun}, ...]  one two"]
    code, out, err = cli("embed", "-", *command, "--json", stdin=ROWS)
    assert code == 1
    first, empty, second = map(json.loads, out.splitlines())
    np.testing.assert_array_equal(np.float32([first["embedding"], second["embedding"]]), vectors)
    assert (first["index"], first["tokens"], second["index"]) == (0, 15, 2)
    assert empty == {"index": 1, "error": "stdin:2: text is empty"}
    whole = json.loads(cli("embed", TEXTS[0], "-m", bert, "--prompt", "query: ", "--no-normalize", "--json").out)
    assert len(whole["embedding"]) == 128
    assert abs(np.linalg.norm(whole["embedding"]) - 1) > 0.01


def test_vectors_in_files(cli, bert, vectors, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(ROWS)
    for name in ("out.npy", "out.parquet", "out.jsonl"):
        command = ["embed", tmp_path / "rows.jsonl", "-m", bert, "--prompt-name", "query", "--dimensions", 8]
        code, out, err = cli(*command, "-o", tmp_path / name, "--output-prefix", "new_")
        assert (code, out) == (1, "")
        said = [f"jaxinfer: error: {tmp_path}/rows.jsonl:2: text is empty", f"{tmp_path}/{name}: 3 rows, 1 with errors"]
        assert [line in err for line in said] == [True, True]
    array = np.load(tmp_path / "out.npy")
    np.testing.assert_array_equal(array[[0, 2]], vectors)
    assert array.dtype == np.float32
    assert np.isnan(array[1]).all()
    table = pq.read_table(tmp_path / "out.parquet").to_pylist()
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    for rows in (table, lines):
        assert [row.get("id") for row in rows] == [7, None, 8]
        np.testing.assert_array_equal(np.float32([rows[0]["new_embedding"], rows[2]["new_embedding"]]), vectors)
        assert (rows[0]["tokens"], rows[0]["new_tokens"]) == (5, 15)
        assert "empty" in rows[1]["new_error"]


def test_precision(cli, bert, vectors, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(ROWS)
    command = ["embed", tmp_path / "rows.jsonl", "-m", bert, "--prompt-name", "query", "--dimensions", 8]
    for precision, dtype in (("int8", np.int8), ("ubinary", np.uint8)):
        cli(*command, "-o", tmp_path / f"{precision}.npy", "--precision", precision)
        array = np.load(tmp_path / f"{precision}.npy")
        assert array.dtype == dtype
        np.testing.assert_array_equal(array[[0, 2]], quantized(vectors, precision))
        assert not array[1].any()
    assert "is for arrays" in cli("embed", "a", "-m", bert, "--precision", "int8").error()
    alone = ["embed", "a", "-m", bert, "-o", tmp_path / "a.npy", "--precision"]
    assert "'int4': it must be one of float32, int8" in cli(*alone, "int4").error()
    assert "give more than one text" in cli(*alone, "int8").error()
    assert not (tmp_path / "a.npy").exists()


def test_classes(cli, single):
    with LLM(single) as llm:
        outputs = llm.classify([("one", "two")], use_tqdm=False)[0].outputs
    command = ["classify", "--pair", "one", "two", "-m", single]
    code, out, err = cli(*command)
    best = sorted(zip(outputs.probs.tolist(), ["cat", "dog", "owl"], strict=True), reverse=True)
    assert (code, out, err) == (0, ", ".join(f"{label} {p:.4f}" for p, label in best) + "  one | two\n", "")
    row = json.loads(cli(*command, "--json").out)
    assert (row["label"], np.float32(row["probs"]).tolist()) == (outputs.label, outputs.probs.tolist())
    pair = b'{"text": "one", "text_pair": "two"}'
    assert json.loads(cli("classify", "-", "-m", single, "--json", stdin=pair).out) == row
    logits = json.loads(cli(*command, "--json", "--logits").out)["logits"]
    assert np.exp(logits) / np.exp(logits).sum() == pytest.approx(row["probs"], abs=1e-6)


def test_ranking(cli, bert, tmp_path):
    (tmp_path / "documents.txt").write_text("three\n\none two\n")
    code, out, err = cli("rerank", "one", tmp_path / "documents.txt", "-m", bert, "--top-n", 1)
    assert (code, err) == (0, "")
    head, line = out.splitlines()
    assert (head.split(), line.split()[1:]) == (["score", "place", "text"], ["1", "one", "two"])
    row = json.loads(cli("rerank", "one", "three", "one two", "-m", bert, "--json").out)
    assert row["ranking"] == [1, 0]
    assert f"{row['relevance_scores'][0]:.4f}" == line.split()[0]


def test_mistakes(cli, bert, single, tmp_path):
    assert "nothing.jsonl" in cli("embed", "nothing.jsonl", "-m", bert).error()
    assert "its name must end in .npy, .jsonl, .parquet" in cli("embed", "a", "-o", "a.txt", "-m", bert).error()
    nowhere = tmp_path / "nowhere"  # said before anything runs
    assert f"there is no folder {nowhere}" in cli("embed", "a", "-o", nowhere / "a.npy", "-m", bert).error()
    assert "give only one of them" in cli("embed", "a", "-o", tmp_path / "a.npy", "--json", "-m", bert).error()
    assert "'passage' is no prompt" in cli("embed", "a", "--prompt-name", "passage", "-m", bert).error()
    assert "gives texts classes" in cli("embed", "a", "-m", single).error()
    assert "it has 3 classes, and a score is of one" in cli("rerank", "a", "b", "-m", single).error()
    assert "two TEXTs for each pair" in cli("classify", "--pair", "a", "-m", single).error()


def test_a_batch_job(cli, bert, vectors, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(ROWS)
    command = ["batch", tmp_path / "rows.jsonl", "-o", tmp_path / "out.parquet", "--task", "embed", "-m", bert]
    done = cli(*command, "--prompt-name", "query", "--dimensions", 8, "--max-errors", 2, "-q")
    assert (done.code, done.err) == (0, "")
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    np.testing.assert_array_equal(np.float32(rows[2]["embedding"]), vectors[1])
    assert "rename it, or give --output-prefix" in rows[0]["error"]
    assert "top_n is nothing for the task embed" in cli(*command, "--top-n", 3).error()
