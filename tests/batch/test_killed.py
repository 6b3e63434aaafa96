"""A job that is killed at random moments, until it is done, writes what it would have written."""

import json
import random

import pytest

from jaxinfer.demo import MODEL_DIR
from tests.batch.conftest import read_rows
from tests.batch.killed import Jobs

MANY = pytest.mark.parametrize(
    "count", [pytest.param(5, marks=pytest.mark.slow), pytest.param(50, marks=pytest.mark.long)]
)
# In float32, as bfloat16 kernels round activations where there are many tokens, so that company makes a difference.
FEW = ["--model", MODEL_DIR, "--dtype", "float32", "--max-num-seqs", 8, "--max-num-batched-tokens", 32, "--quiet"]


@pytest.fixture(scope="module")
def jobs():
    with Jobs() as jobs:
        # Compiles all programs, which takes longer than any of the runs that are killed has.
        jobs.run("bench", "throughput", "--num-prompts", 1, "--input-len", 1, "--output-len", 1, *FEW)
        yield jobs


def rows(count):
    """Greedy ones, and others with a seed of their own or of the job's, with log-probabilities or without, broken."""
    for i in range(count):
        row = {"prompt": f"What is {i % 97} + {i // 97}?", "id": i}
        if i % 3 == 1:
            row["params"] = {"temperature": 0.9, "logprobs": 1}
        if i % 5 == 1:
            row["params"] = {"temperature": 0.9, "seed": i}
        if i % 7 == 3:
            row["params"] = {"logprobs": 2}
        yield row if i % 100 != 50 else {"id": i}


class Case:
    """A job and what it writes when nothing happens to it."""

    def __init__(self, jobs, source, expected, rows_per_part):
        options = ["--token-ids", "--rows-per-part", rows_per_part, "--max-tokens", 3, "--max-errors", 100, *FEW]
        self.command = ["batch", source, *options]
        self.jobs, self.identical = jobs, 0
        self.seconds = jobs.run(*self.command, "--output", expected / "out")
        self.expected = expected / "out"
        self.rows = read_rows(self.expected)

    def check(self, output):
        """Nothing is missing, nothing is there twice, all is the same."""
        assert not list(output.parent.glob(f"{output.name}*/.*"))  # temporaries, locks
        got = read_rows(output)
        self.identical += got == self.rows
        assert [row["id"] for row in got] == list(range(len(self.rows)))
        for row, expected in zip(got, self.rows, strict=True):
            assert row | {"logprobs": None} == expected | {"logprobs": None}
            assert numbers(row) == pytest.approx(numbers(expected), abs=1e-5)

    def kill(self, rng, output):
        """Kills the job until it is done; returns how often."""
        kills = self.jobs.run_and_kill(rng, 1.1 * self.seconds, *self.command, "--output", output)
        self.check(output)
        return kills

    def kill_shards(self, rng, output):
        """The same with each of two shards, and with joining them."""
        kills = 0
        for i in (0, 1):
            command = [*self.command, "--output", output, "--shard", f"{i}/2"]
            kills += self.jobs.run_and_kill(rng, 1.2 * self.seconds, *command)
        kills += self.jobs.run_and_kill(rng, 0.1, "batch", "--merge", output)
        self.check(output)
        return kills


def numbers(row):
    return [entry["logprob"] for token in row.get("logprobs") or () for entry in token]


@pytest.fixture(scope="module")
def small(jobs, tmp_path_factory):
    return make(jobs, tmp_path_factory, 300, 50)


@pytest.fixture(scope="module")
def large(jobs, tmp_path_factory):
    return make(jobs, tmp_path_factory, 2000, 100)


def make(jobs, tmp_path_factory, count, rows_per_part):
    folder = tmp_path_factory.mktemp("killed")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(count)))
    return Case(jobs, folder / "rows.jsonl", folder, rows_per_part)


@pytest.mark.slow
def test_killed_shards(small, tmp_path):
    small.kill_shards(random.Random(2), tmp_path / "out")


@pytest.mark.slow
def test_killed_while_one_file_is_made(small, tmp_path):
    small.kill(random.Random(3), tmp_path / "out.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.manifest.json"]


@MANY
def test_many_jobs(large, tmp_path, count):
    before = large.identical
    kills = sum(large.kill(random.Random(seed), tmp_path / str(seed)) for seed in range(count))
    print(f"{count} jobs, {kills} kills, {large.identical - before} outputs the same to the last bit")
    assert kills >= count // 2  # a job may be faster than the moment when it was to be killed
