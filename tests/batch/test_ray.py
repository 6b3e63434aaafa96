"""`Predictor` by itself, and on a Ray of this machine, whose actor is killed."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxinfer import SamplingParams
from jaxinfer.batch import run
from jaxinfer.batch.ray import Predictor
from jaxinfer.demo import MODEL_DIR
from tests.batch.conftest import read_rows

EXAMPLE = Path(__file__).parents[2] / "docs/ray_batch.py"
SIZES = {"max_num_seqs": 4, "max_num_batched_tokens": 32}
HOT = {"max_tokens": 8, "temperature": 1.5}
SECONDS = 240  # far more than anything takes, even on a busy machine

# The example, on a Ray of its own.
DRIVER = """
import runpy, sys
import ray
ray.init(address="local", num_cpus=2, include_dashboard=False, _temp_dir=sys.argv[1], object_store_memory=2**27)
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
ray.shutdown()
"""


def predictor(**options):
    return Predictor(MODEL_DIR, **{"sampling_params": {"max_tokens": 8}} | SIZES | options)


def both(tmp_path, table, id_column="id", batches=3, **options):
    """The rows of jaxinfer.batch.run, and those of a Predictor that has them in batches."""
    pq.write_table(table, tmp_path / "rows.parquet")
    options = {"sampling_params": {"max_tokens": 8}} | SIZES | options
    run(tmp_path / "rows.parquet", tmp_path / "out", model=MODEL_DIR, format="parquet", **options)
    expected = read_rows(tmp_path / "out")
    assert all("other_columns" not in row for row in expected)
    predict = predictor(id_column=id_column, **options)
    size = -(-len(table) // batches)
    # Last batch first: nothing may depend on what was there before.
    done = [predict(table.slice(start, size)) for start in range(0, len(table), size)][::-1]
    answers = pa.concat_tables(done[::-1]).to_pylist()
    for name in {"logprobs", "prompt_logprobs"} & answers[0].keys() - expected[0].keys():  # there for rows that ask
        assert all(row.pop(name) is None for row in answers)
    return expected, answers


def test_equal_to_a_job(tmp_path):
    prompts = [f"What is {i} + {i + 7}?" for i in range(20)]
    params = [HOT if i % 2 else None for i in range(20)]  # those without a seed too: ids are row numbers
    table = pa.table({"id": range(20), "prompt": prompts, "params": params})
    expected, answers = both(tmp_path, table)
    assert answers == expected
    assert len({row["generated_text"] for row in answers}) == 20


@pytest.mark.parametrize("options", [{"task": "score", "token_ids": True}, {"task": "chat", "token_ids": True}])
def test_tasks(tmp_path, options):
    texts = ["What is 1 + 2?", "What is 1 + 3?", "", "Sort the words: b a."]
    expected, answers = both(tmp_path, pa.table({"id": range(4), "text": texts}), batches=2, **options)
    assert list(answers[0]) == list(expected[0])
    for answer, other in zip(answers, expected, strict=True):
        assert (answer.pop("error") is None) == (other.pop("error") is None) == bool(answer["text"])
        for name, value in other.items():
            measured = value is not None and ("logprob" in name or "perplexity" in name)
            assert answer[name] == (pytest.approx(value, rel=1e-4) if measured else value)


def test_bad_rows(tmp_path):
    prompts = ["What is 1 + 2?", "", None, "many " * 400, "What is 1 + 3?"]
    expected, answers = both(tmp_path, pa.table({"id": ["a", "b", "c", "d", "e"], "prompt": prompts}))
    assert [row["generated_text"] for row in answers] == [row["generated_text"] for row in expected]
    for number, (answer, other) in enumerate(zip(answers, expected, strict=True), 1):
        if other["error"] is None:
            assert answer["error"] is None
        else:
            prefix = f"{tmp_path}/rows.parquet:{number}: "
            assert other["error"].removeprefix(prefix) == answer["error"].removeprefix(f"id '{answer['id']}': ")
            assert other["error"].startswith(prefix)
            assert answer["error"].startswith("id '")
    assert sum(row["error"] is None for row in answers) == 2


def test_seeds_without_ids():
    predict = predictor(sampling_params=HOT)
    table = pa.table({"prompt": ["Once"] * 3 + ["Then"] * 3, "other": [1, 1, 2, 1, 2, 3]})
    texts = [row["generated_text"] for row in predict(table).to_pylist()]
    assert texts[0] == texts[1]  # equal rows
    assert len(set(texts)) == 5
    for start in range(6):
        assert predict(table.slice(start, 1).select(["other", "prompt"]))["generated_text"][0].as_py() == texts[start]
    assert predict(table.slice(0, 0)).schema == predict(table).schema


def test_formats_of_batches():
    predict = predictor(id_column="id")
    table = pa.table({"id": [0, 1], "prompt_token_ids": [[1, 300, 301], [1, 302]], "text": [None, None]})
    expected = predict(table).to_pylist()
    assert all(row["error"] is None for row in expected)
    numpy = {
        name: column.to_numpy(zero_copy_only=False)
        for name, column in zip(table.column_names, table.columns, strict=True)
    }
    assert predict(numpy).to_pylist() == expected
    assert predict(table.to_pandas()).to_pylist() == expected


def test_ids_and_names():
    predict = predictor(id_column="id")
    with pytest.raises(ValueError, match="id_column is 'id', and there are 'prompt'"):
        predict(pa.table({"prompt": ["Once"]}))
    assert predict(pa.table({"prompt": ["Once"], "id": [None]}))["error"].to_pylist() == [
        "id None: 'id', the id_column, is null"
    ]
    (row,) = predict(pa.table({"prompt": ["Once"], "id": [7], "error": ["old"]})).to_pylist()
    assert row["error"] == "id 7: has a column 'error', which is a result's name; rename it, or give --output-prefix"


def test_options_that_make_no_sense():
    with pytest.raises(ValueError, match="task is 'sing'"):
        predictor(task="sing")
    with pytest.raises(ValueError, match="prompt template"):
        predictor(sampling_params=SamplingParams(temperature=0.5), prompt_template="{}")


@contextlib.contextmanager
def example(*arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    """docs/ray_batch.py while it runs, which must end well. Nothing of it and of its Ray is left afterwards."""
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "RAY_ADDRESS")}
    environment |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_memory_monitor_refresh_ms": "0"}
    temporary = tempfile.mkdtemp(prefix="ray-")  # short: the names of sockets are limited
    command = [sys.executable, "-c", DRIVER, temporary, EXAMPLE, *arguments]
    with open(f"{temporary}/log", "w+") as log:
        process = subprocess.Popen([str(part) for part in command], env=environment, stdout=log, stderr=log)
        try:
            yield process
            code = process.wait(SECONDS)
            log.seek(0)
            assert code == 0, log.read()
        finally:
            family = [*psutil.Process(process.pid).children(recursive=True), process] if process.poll() is None else []
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            process.wait()
            shutil.rmtree(temporary, ignore_errors=True)


def actors(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The processes that have a model."""
    processes = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "MapBatches(Predictor)" in " ".join(child.cmdline()):
                processes.append(child)
    return processes


@pytest.mark.parametrize(
    "kill", [pytest.param(False, marks=pytest.mark.long), pytest.param(True, marks=pytest.mark.slow)]
)
def test_on_ray(tmp_path, kill):
    rows = 240 if kill else 24
    prompts = [f"What is {i} + {i + 7}?" if i % 10 != 3 else "" for i in range(rows)]
    params = [{"temperature": 1.5, "top_p": 0.9} if i % 2 else None for i in range(rows)]
    pq.write_table(pa.table({"id": range(rows), "prompt": prompts, "params": params}), tmp_path / "rows.parquet")
    with example(tmp_path / "rows.parquet", tmp_path / "answers", "--rows", 8) as process:
        end = time.monotonic() + SECONDS
        while kill and not any(tmp_path.glob("answers/*.parquet")):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.02)
        if kill:
            (actor,) = actors(process)
            actor.kill()
            actor.wait(10)
            assert len(list(tmp_path.glob("answers/*.parquet"))) < rows / 8 / 2  # most of it is still to be done
    run(
        tmp_path / "rows.parquet",
        tmp_path / "job",
        model=MODEL_DIR,
        format="parquet",
        sampling_params={"max_tokens": 64},
    )
    expected = read_rows(tmp_path / "job")
    files = tmp_path.glob("answers/*.parquet")
    answers = sorted((row for file in files for row in pq.read_table(file).to_pylist()), key=lambda row: row["id"])
    assert [row["id"] for row in answers] == list(range(rows))
    for answer, other in zip(answers, expected, strict=True):
        assert (answer["error"] is None) == (other["error"] is None) == bool(answer["prompt"])
        for name in ("prompt", "generated_text", "finish_reason", "prompt_tokens", "generated_tokens"):
            assert answer[name] == other[name]
