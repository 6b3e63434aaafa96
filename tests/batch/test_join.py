"""Shards, and what is made of them."""

import json
import math
import os
import shutil

import pytest

from jaxinfer.batch import merge, run
from jaxinfer.batch.shards import parse_shard
from tests.batch.conftest import after_a_part

ROWS = [{"prompt": f"What is {i} + 1?", "id": i} for i in range(23)]


@pytest.fixture
def shard(demo, rows_file, tmp_path):
    """Runs one shard of a job with five parts."""

    def start(which, output="out", **options):
        options = {"sampling_params": {"max_tokens": 2}, "rows_per_part": 5} | options
        return run(rows_file(ROWS), tmp_path / output, model=demo, shard=which, **options)

    return start


def parts(folder):
    return {path.name: path.read_bytes() for path in folder.glob("part-*")}


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_a_folder_that_shards_share(shard, tmp_path, format, count):
    shard(None, "whole", format=format)
    summaries = [shard(f"{i}/{count}", format=format) for i in reversed(range(count))]
    assert sum(summary.rows for summary in summaries) == 23
    merged = merge(tmp_path / "out")
    assert (merged.complete, merged.rows, merged.errors) == (True, 23, 0)
    assert parts(tmp_path / "out") == parts(tmp_path / "whole")
    joined, whole = (json.loads((tmp_path / name / "_manifest.json").read_text()) for name in ("out", "whole"))
    assert joined == whole
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(tmp_path / "whole"))
    assert merge(tmp_path / "out") == merged  # once more
    assert shard("1/2", format=format).rows == 23  # complete
    assert shard(None, format=format).rows == 23


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet", "out.jsonl.gz", "out.csv.zst"])
def test_one_file(shard, tmp_path, name):
    whole = name.replace("out", "whole")
    shard(None, whole)
    for i in range(2):
        shard(f"{i}/2", name)
        assert not (tmp_path / name).exists()
    merge(tmp_path / name)
    assert (tmp_path / name).read_bytes() == (tmp_path / whole).read_bytes()
    assert not (tmp_path / f"{name}.parts").exists()
    assert merge(tmp_path / name).rows == 23
    assert shard("0/2", name).rows == 23


def test_folders_of_their_own(shard, tmp_path):
    shard(None, "whole")
    for i in range(3):
        shard(f"{i}/3", f"out{i}")
    for target in ("out0", "new"):
        merge(tmp_path / target, *(tmp_path / f"out{i}" for i in range(3) if f"out{i}" != target))
        assert parts(tmp_path / target) == parts(tmp_path / "whole")
        if target == "out0":
            shutil.rmtree(tmp_path / "out0")
            shard("0/3", "out0")
    assert (
        list(parts(tmp_path / "out1")) == ["part-00001.jsonl", "part-00004.jsonl"] or len(parts(tmp_path / "out1")) == 2
    )


def test_what_can_not_be_merged(shard, tmp_path):
    with pytest.raises(ValueError, match="no shards"):
        merge(tmp_path / "out")
    shard("0/2")
    with pytest.raises(ValueError, match="shard 1/2 is not there"):
        merge(tmp_path / "out")
    shard("1/2", stop=after_a_part())
    with pytest.raises(ValueError, match=r"_manifest-00001-of-00002\.json: this shard is not complete"):
        merge(tmp_path / "out")
    shard("1/2")
    shutil.copytree(tmp_path / "out", tmp_path / "again")
    with pytest.raises(ValueError, match="this shard is also in"):
        merge(tmp_path / "out", tmp_path / "again")
    with pytest.raises(ValueError, match="the shards are jsonl"):
        merge(tmp_path / "out.parquet", tmp_path / "out")
    part = tmp_path / "out/part-00003.jsonl"
    content = part.read_bytes()
    part.unlink()
    with pytest.raises(ValueError, match=r"part-00003\.jsonl: is gone"):
        merge(tmp_path / "out")
    part.write_bytes(content)
    shard("1/2", "other", sampling_params={"max_tokens": 3})
    (tmp_path / "out/_manifest-00001-of-00002.json").unlink()
    with pytest.raises(ValueError, match=r"of another job: sampling_params\.max_tokens was 2 and is 3"):
        merge(tmp_path / "out", tmp_path / "other")


def test_numbers_of_a_manifest_that_can_not_be(shard, tmp_path):
    """One line, before anything is made of them."""
    for i in range(2):
        shard(f"{i}/2")
    path = tmp_path / "out/_manifest-00001-of-00002.json"
    whole = json.loads(path.read_text())
    for name in ("shard", "shards", "parts", "rows", "errors", "input_rows", "rows_per_part", "complete"):
        for value in (-1, 10**30, 1.5, True, "8", [], {}, math.nan, math.inf):
            if (name, value) in (("input_rows", True), ("complete", True)):
                continue
            wrong = {"job": whole["job"] | {name: value}} if name == "rows_per_part" else {name: value}
            path.write_text(json.dumps(whole | wrong))
            with pytest.raises(ValueError, match=r"_manifest-00001-of-00002\.json: not a manifest that can be read \("):
                merge(tmp_path / "out")
    for first in (path.with_name("_manifest-00000-of-00002.json"), path):  # and with each other
        content = json.loads(first.read_text()) | {"input_rows": 2**60, "job": whole["job"], "complete": True}
        first.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"part-\d+\.jsonl: is gone, and the manifest counts it"):
        merge(tmp_path / "out")
    path.write_text(json.dumps(whole | {"shards": 2**60, "parts": 2**60}))
    path.with_name("_manifest-00000-of-00002.json").unlink()
    with pytest.raises(ValueError, match="shard 0/1152921504606846976 is not there"):
        merge(tmp_path / "out")
    path.write_bytes(b"[" * 10**6)
    with pytest.raises(ValueError, match="not a manifest that can be read"):
        merge(tmp_path / "out")


def test_a_manifest_does_not_choose_which_files_are_read(shard, tmp_path):
    """A job's format is the end of its parts' names."""
    for i in range(2):
        shard(f"{i}/2")
    for path in (tmp_path / "out").glob("_manifest*"):
        content = json.loads(path.read_text())
        content["job"]["format"] = "/../../secret"
        path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"not a manifest that can be read \(format is '/\.\./\.\./secret'\)"):
        merge(tmp_path / "out")


def test_a_part_that_was_changed(shard, tmp_path):
    for i in range(2):
        shard(f"{i}/2", "out.jsonl")
    part = tmp_path / "out.jsonl.parts/part-00001.jsonl"
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"part-00001\.jsonl: has 4 rows, and 5 were written"):
        merge(tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("spec", "environment", "expected"),
    [
        (None, {}, (0, 1)),
        ("2/4", {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, (2, 4)),
        (None, {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, (1, 2)),
        (None, {"TPU_WORKER_ID": "3", "TPU_WORKER_HOSTNAMES": "a,b,c,d"}, (3, 4)),
        (None, {"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"}, (0, 1)),
        (None, {"TPU_WORKER_ID": "WARNING: no number", "TPU_WORKER_HOSTNAMES": "localhost"}, (0, 1)),
    ],
)
def test_which_shard(spec, environment, expected):
    assert parse_shard(spec, environment) == expected


@pytest.mark.parametrize("spec", ["4/4", "1", "-1/2", "a/b", "1/0", ""])
def test_no_such_shard(spec):
    with pytest.raises(ValueError, match="shard is"):
        parse_shard(spec, {})


def test_what_is_left_at_the_very_end(shard, tmp_path):
    """Killed when all was done: the next start tidies up."""
    for name in ("out", "out.jsonl"):
        shard(None, name)
    (tmp_path / "out/._manifest.json.lock").touch()
    (tmp_path / "out.jsonl.parts").mkdir()
    (tmp_path / "out.jsonl.parts/part-00000.jsonl").touch()
    for name in ("out", "out.jsonl"):
        assert shard(None, name).rows_now == 0
    assert not (tmp_path / "out/._manifest.json.lock").exists()
    assert not (tmp_path / "out.jsonl.parts").exists()
