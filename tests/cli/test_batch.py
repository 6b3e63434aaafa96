"""`jaxinfer batch`."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from jaxinfer.demo import MODEL_DIR
from tests.batch.conftest import read_rows
from tests.cli.run import Terminal

QUESTIONS = [{"prompt": f"What is {i} + 1?", "id": i} for i in range(12)]
FEW = ["--max-num-seqs", "4", "--max-num-batched-tokens", "32"]
OPTIONS = ["--model", MODEL_DIR, "--max-tokens", 3, "--rows-per-part", 5, *FEW]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return path


def test_options_arrive(cli, source, tmp_path):
    code, out, err = cli("batch", source, "-o", tmp_path / "out", *OPTIONS, "--token-ids", "--logprobs", 1, "-q")
    assert (code, err) == (0, "")
    summary = json.loads(out)
    assert (summary["complete"], summary["rows"], summary["errors"]) == (True, 12, 0)
    rows = read_rows(tmp_path / "out")
    assert [row["id"] for row in rows] == list(range(12))
    assert all(len(row["token_ids"]) == len(row["logprobs"]) <= 3 for row in rows)
    assert len(list((tmp_path / "out").glob("part-*.jsonl"))) == 3
    code, out, err = cli("batch", source, "-o", tmp_path / "out", *OPTIONS, "--token-ids", "--logprobs", 1)
    assert (code, json.loads(out)["rows_now"]) == (0, 0)
    assert err == f"jaxinfer: {tmp_path / 'out'} is complete already\n"
    line = cli("batch", source, "-o", tmp_path / "out", *OPTIONS, "--seed", 5, "--truncate").error()
    for fact in ("seed was 0 and is 5", "truncate was false and is true", "logprobs was 1", "token_ids was true"):
        assert fact in line


def test_stdin_template_parquet(cli, tmp_path):
    options = ["--prompt-template", "What is {id} + 1?", "--format", "parquet", *OPTIONS]
    lines = "".join(json.dumps({"id": i}) + "\n" for i in range(7)).encode()
    assert cli("batch", "-", "-o", tmp_path / "out", *options, "--quiet", stdin=lines)[::2] == (0, "")
    rows = read_rows(tmp_path / "out")
    assert [row["id"] for row in rows] == list(range(7))
    assert all(row["generated_text"] and row["error"] is None for row in rows)


def test_shards(cli, source, tmp_path):
    for i in range(2):
        assert cli("batch", source, "-o", tmp_path / "out.jsonl", *OPTIONS, "--shard", f"{i}/2").code == 0
    code, out, err = cli("batch", "--merge", tmp_path / "out.jsonl")
    assert (code, err, json.loads(out)["rows"]) == (0, "", 12)
    assert [row["id"] for row in read_rows(tmp_path / "out.jsonl")] == list(range(12))


def test_scores(cli, source, tmp_path):
    (tmp_path / "texts.txt").write_text("What is 1 + 2?\n3 + 4\n")
    assert (
        cli("batch", tmp_path / "texts.txt", "-o", tmp_path / "out", "--task", "score", "-m", MODEL_DIR, *FEW).code == 0
    )
    assert all(row["logprob"] < 0 for row in read_rows(tmp_path / "out"))
    command = ["batch", source, "-o", tmp_path / "out", "--task", "score", "--top-k", 3]
    assert "--top-k: nothing is sampled by the task score" in cli(*command).error()


def test_exit_codes_where_rows_have_errors(cli, source, tmp_path):
    """1 where some have, unless --max-errors takes them; also of a job that is complete already."""
    source.write_text('{"prompt": "x"}\n{"prompt": ""}\n{"prompt": ""}\n')
    command = ["batch", source, "-o", tmp_path / "out", *OPTIONS]
    for rows_now in (3, 0):
        code, out, err = cli(*command)
        assert (code, json.loads(out)["rows_now"], json.loads(out)["errors"]) == (1, rows_now, 2)
        assert err.endswith("jaxinfer: 2 of 3 rows have errors\n")
    assert [cli(*command, "--max-errors", n, "--quiet").code for n in (0, 1, 2, 3)] == [1, 1, 0, 0]
    assert "exit code 1 if any has an error" in " ".join(cli("batch", "--help").out.replace("│", " ").split())


def test_csv_prefix_overwrite(cli, source, tmp_path):
    out = tmp_path / "out.csv"
    assert cli("batch", source, "-o", out, *OPTIONS).code == 0
    options = ["--output-prefix", "my_", "--prompt-template", "{prompt}!"]
    assert "holds another job" in (line := cli("batch", source, "-o", out, *OPTIONS, *options).error())
    assert "--overwrite" in line
    assert cli("batch", source, "-o", out, *OPTIONS, *options, "--overwrite").code == 0
    header = "prompt,id,my_generated_text,my_finish_reason,my_prompt_tokens,my_generated_tokens,my_error"
    assert out.read_text().split("\n")[0] == header


@pytest.mark.slow
def test_a_slow_pipe(tmp_path):
    """Each row is written before the next one comes."""
    options = [*map(str, OPTIONS), "--rows-per-part", "1", "--quiet"]
    command = [sys.executable, "-m", "jaxinfer", "batch", "-", "-o", tmp_path / "out", *options]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as job:
        for i, row in enumerate(QUESTIONS[:3]):
            job.stdin.write(json.dumps(row).encode() + b"\n")
            end = time.monotonic() + 120
            while not (tmp_path / f"out/part-0000{i}.jsonl").exists():
                assert time.monotonic() < end
                time.sleep(0.01)
        job.stdin.close()
        assert json.loads(job.stdout.read())["rows"] == 3
    assert job.returncode == 0


@pytest.mark.slow
def test_sigterm_while_a_pipe_is_waited_for(tmp_path):
    """It ends, with a thread that can't be ended in the middle of reading."""
    command = [sys.executable, "-m", "jaxinfer", "batch", "-", "-o", tmp_path / "out", *map(str, OPTIONS)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as job:
        job.stdin.write(b"".join(json.dumps(row).encode() + b"\n" for row in QUESTIONS[:5]))
        end = time.monotonic() + 120
        while not (tmp_path / "out/part-00000.jsonl").exists():
            assert time.monotonic() < end
            time.sleep(0.01)
        job.send_signal(signal.SIGTERM)
        assert job.wait(60) == 143
        assert job.stderr.read().splitlines()[-1].startswith(b"jaxinfer: stopped; to go on: ")  # progress before it
        job.stdin.close()


def test_too_many_errors(cli, source, tmp_path):
    source.write_text('{"prompt": 1}\n{"prompt": 2}\n')
    code, out, err = cli("batch", source, "-o", tmp_path / "out", *OPTIONS, "--max-errors", 1)
    assert (code, out) == (1, "")
    assert "2 rows have errors, and max_errors is 1" in err


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["rows.jsonl"], ["--output is missing"]),
        ([], ["INPUT"]),
        (["nothing.jsonl", "-o", "out"], ["nothing.jsonl"]),
        (["rows.jsonl", "-o", "out", "--task", "sum"], ["sum"]),
        (["rows.jsonl", "-o", "out", "--shard", "3"], ["'3'", "I/N"]),
        (["rows.jsonl", "-o", "rows.jsonl"], ["rows.jsonl", "is the output"]),
        (["rows.jsonl", "-o", "out.json"], ["no *.json is written", "*.csv"]),
        (["rows.jsonl", "-o", "out", "--prompt-template", "{promt}"], ["no column 'promt'", "'prompt', 'id'"]),
        (["rows.jsonl", "-o", "out", "--model", "./nowhere"], ["nowhere"]),
        (["rows.jsonl", "-o", "out", "--temperature", "-1"], ["temperature is -1"]),
        (["rows.jsonl", "-o", "memory://out"], ["memory://out", "is gone when the command ends"]),
        (["rows.jsonl", "-o", "a::b", "-m", "me/not-there"], ["a::b", "a URL within another"]),
        (["rows.jsonl", "-o", "gs:/bucket/out", "-m", "me/not-there"], ["gs:/bucket/out", "has lost a slash"]),
        (["rows.jsonl", "-o", "n" * 256, "-m", "me/not-there"], ["File name too long"]),
        (["rows.jsonl", "-o", "n" * 240 + ".jsonl", "-m", "me/not-there"], ["File name too long"]),
        (["rows.jsonl", "-o", "rows.jsonl/out", "-m", "me/not-there"], ["can't be made"]),
        (["--merge", "out"], ["no shards"]),
        (["--merge", "out", "-o", "all"], ["no --output"]),
    ],
)
def test_mistakes_are_one_line(cli, source, tmp_path, monkeypatch, arguments, facts):
    monkeypatch.chdir(tmp_path)
    line = cli("batch", *arguments).error()
    assert all(fact in line for fact in facts), line
    assert os.listdir(tmp_path) == ["rows.jsonl"]


def test_an_output_that_leads_nowhere(cli, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dangling").symlink_to("nowhere")
    assert "is there already" in cli("batch", source, "-o", "dangling", "-m", "me/not-there").error()


def test_help_imports_nothing_heavy():
    code = """
import sys
from jaxinfer.cli import main
import jaxinfer.batch
assert main(["batch", "--help"]) == 0
heavy = {"jax", "numpy", "fsspec", "pyarrow", "zstandard", "tokenizers", "tqdm"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


class Background:
    """`jaxinfer batch` in a process of its own, with enough to do for a minute."""

    def __init__(self, source, output, *options):
        source.write_text("".join(json.dumps(row | {"id": i}) + "\n" for i, row in enumerate(QUESTIONS * 10_000)))
        command = ["batch", source, "--output", output, *OPTIONS, *options]
        arguments = [sys.executable, "-m", "jaxinfer", *map(str, command)]
        self.process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.output = output

    def wait_for_parts(self, count):
        end = time.monotonic() + 120
        while len(list(self.output.glob("part-*"))) < count:
            assert time.monotonic() < end
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.01)

    def end(self, number):
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


def whole_parts(output):
    manifest = json.loads((output / "_manifest.json").read_text())
    sizes = [path.read_bytes().count(b"\n") for path in sorted(output.glob("part-*"))]
    assert sizes == [5] * len(sizes)
    assert manifest["parts"] <= len(sizes) <= manifest["parts"] + 1  # broken off between a part and the manifest
    assert not manifest["complete"]
    assert not [path for path in output.iterdir() if path.suffix in (".tmp", ".lock")]
    return manifest["parts"]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_signals(source, tmp_path, number, code):
    output = tmp_path / "out"
    job = Background(source, output)
    job.wait_for_parts(3)
    begun = time.monotonic()
    got, out, err = job.end(number)
    assert (got, out) == (code, "")
    assert re.search(rf"^jaxinfer: stopped; to go on: jaxinfer batch {source} --output {output} .*$", err, re.M)
    assert time.monotonic() - begun < 15
    assert whole_parts(output) >= 2


def test_sigterm_without_time(source, tmp_path):
    """With no grace and a part that takes minutes, it ends at once."""
    output = tmp_path / "out"
    job = Background(source, output, "--grace", 0, "--rows-per-part", 100_000)
    end = time.monotonic() + 120
    while not (output / "_manifest.json").exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    time.sleep(2)
    got, out, err = job.end(signal.SIGTERM)
    assert (got, out) == (143, "")
    assert "to go on: jaxinfer batch" in err
    assert sorted(os.listdir(output)) == ["_manifest.json"]


def test_lines_where_there_is_no_terminal(cli, source, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxinfer.batch.progress.SAID", 0)
    code, _, err = cli("batch", source, "-o", tmp_path / "out", *OPTIONS)
    assert code == 0
    assert all(
        re.fullmatch(r"jaxinfer: \d+ of 12 rows, \d+ tokens/s, 0 errors(, \d+\.\d minutes left)?", line)
        for line in err.splitlines()
    )
    assert err.splitlines()[-1].startswith("jaxinfer: 12 of 12 rows")


def test_a_bar_at_a_terminal(source, tmp_path):
    with Terminal("batch", source, "-o", tmp_path / "out", *OPTIONS) as terminal:
        assert terminal.exit_code() == 0
    assert "/12 [" in terminal.seen
    assert "tokens/s" in terminal.seen
    assert '"complete": true' in terminal.seen


def test_the_mesh_is_the_models(cli, model, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "one"}\n')
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out"
    assert "mesh is 'tensor=3'" in cli("batch", rows, "-o", out, "-m", model, "--mesh", "tensor=3").error()
