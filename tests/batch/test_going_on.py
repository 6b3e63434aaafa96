"""Jobs that are started again, and what their output holds then."""

import dataclasses
import errno
import gzip
import json
import os
import shutil

import pytest

from jaxinfer import LLM
from jaxinfer.batch import begin, loop, manifest, run
from jaxinfer.batch.parts import Output
from jaxinfer.demo import MODEL_DIR
from tests.batch.conftest import QUESTIONS, SHORT, after_a_part, files, read_rows


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
    source = rows_file(QUESTIONS)
    assert not job(source, stop=after_a_part()).complete
    before = files(tmp_path / "out")
    with pytest.raises(ValueError) as error:
        job(source, **changes)
    assert all(fact in str(error.value) for fact in [*facts, str(tmp_path / "out")])
    assert files(tmp_path / "out") == before


def test_another_model(job, rows_file, tmp_path):
    source = rows_file(QUESTIONS)
    assert not job(source, stop=after_a_part()).complete
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
    source = rows_file(QUESTIONS)
    assert not job(source, stop=after_a_part()).complete
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
        if asked < 2:
            assert (summary.rows, summary.complete) == (10 * asked, False)  # the part that was the next one
        assert job(source, f"out{asked}").complete
        assert files(tmp_path / f"out{asked}") == files(tmp_path / "expected")


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


def test_a_store_of_objects(job, rows_file, tmp_path, demo):
    import fsspec

    source = rows_file(QUESTIONS)
    job(source)
    options = {"model": demo, "sampling_params": SHORT, "rows_per_part": 10}
    assert not run(source, "memory://job-test/out", stop=after_a_part(), **options).complete
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


def test_nothing_is_lost_where_nothing_was_written(job, rows_file, tmp_path):
    """Before the first part a job may become any other."""
    source = rows_file(QUESTIONS)
    assert not job(source, stop=lambda: True, format="csv").complete
    assert job(source, sampling_params={"max_tokens": 2}, prompt_template="{prompt}!").complete
    job(source, "expected", sampling_params={"max_tokens": 2}, prompt_template="{prompt}!")
    assert files(tmp_path / "out") == files(tmp_path / "expected")


def test_further_files_at_the_end(job, rows_file, tmp_path, monkeypatch):
    sources = [rows_file(QUESTIONS), rows_file(QUESTIONS[:7], "more.jsonl")]
    assert not job(sources[0], "early", stop=after_a_part()).complete
    write = Output.write

    def killed(self, path, content):
        if path.endswith("part-00002.jsonl"):  # which is not full: the input's end is known
            raise KeyboardInterrupt
        write(self, path, content)

    monkeypatch.setattr(Output, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        job(sources[0], "late")
    monkeypatch.undo()
    job(sources, "expected")
    for name in ("early", "late"):
        assert job(sources, name).rows == 32
        assert files(tmp_path / name) == files(tmp_path / "expected")
    job(sources[0], "complete")
    with pytest.raises(ValueError, match=r"more\.jsonl is new"):
        job(sources, "complete")


@pytest.mark.parametrize("name", ["out", "out.jsonl", "out.csv"])
def test_overwriting(job, rows_file, tmp_path, name):
    """Another job is removed, whatever there is of it; the same one goes on."""
    source, other = rows_file(QUESTIONS), {"sampling_params": {"max_tokens": 2}}
    job(source, f"expected.{name}", **other)
    job(source, name, rows_per_part=5)
    assert job(source, name, overwrite=True, stop=after_a_part(), **other).rows == 10
    assert name == "out" or not (tmp_path / name).exists()
    assert job(source, name, overwrite=True, **other).rows_now == 15
    assert job(source, name, overwrite=True, **other).rows_now == 0
    expected, got = tmp_path / f"expected.{name}", tmp_path / name
    if name == "out":
        assert files(expected) == files(got)
        assert sorted(os.listdir(got)) == ["_manifest.json", *files(got)]
    else:
        assert expected.read_bytes() == got.read_bytes()


def test_overwriting_what_can_not_be_gone_on_with(job, rows_file, tmp_path):
    source = rows_file(QUESTIONS[:12])
    job(source, rows_per_part=2)
    (tmp_path / "out/part-00001.jsonl").unlink()
    assert job(source, overwrite=True, rows_per_part=2).rows_now == 12
    (tmp_path / "out/_manifest.json").write_text("{}")
    assert job(source, overwrite=True, format="csv").rows_now == 12
    assert list(files(tmp_path / "out")) == ["part-00000.csv", "part-00001.csv"]
    for i in range(2):
        job(source, "shards", shard=f"{i}/2")
    with pytest.raises(ValueError, match="shards can't overwrite it"):
        job(source, "shards", shard="0/2", sampling_params={"max_tokens": 2}, overwrite=True)
    assert job(source, "shards", overwrite=True).rows_now == 12
    assert sorted(os.listdir(tmp_path / "shards")) == ["_manifest.json", "part-00000.jsonl", "part-00001.jsonl"]
    (tmp_path / "out.jsonl").write_text("mine")
    assert job(source, "out.jsonl", overwrite=True).rows_now == 12
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"not of a batch job \(thesis\.tex\)"):
        job(source, "mine", overwrite=True)


def test_another_model_overwrites(job, rows_file, tmp_path):
    """What shows only once the model is loaded."""
    source = rows_file(QUESTIONS[:3])
    job(source, stop=after_a_part(), rows_per_part=1)
    with LLM(MODEL_DIR, max_model_len=100) as shorter:
        assert job(source, model=shorter, overwrite=True, rows_per_part=1).rows_now == 3
    assert json.loads((tmp_path / "out/_manifest.json").read_text())["job"]["max_model_len"] == 100


def test_an_input_is_not_overwritten(job, rows_file, tmp_path):
    source = rows_file(QUESTIONS)
    for output in ("rows.jsonl", "."):
        with pytest.raises(ValueError, match=r"rows\.jsonl: is the output, or within it"):
            job(source, output, overwrite=True)
    assert os.listdir(tmp_path) == ["rows.jsonl"]


@pytest.mark.parametrize("seen", ["_find", "take", "check_parts", "lock"])
@pytest.mark.parametrize("name", ["out", "out.jsonl"])
def test_another_process_ends_meanwhile(job, rows_file, tmp_path, monkeypatch, name, seen):
    """A job that looks at its output while another one ends it finds it complete, whatever it has seen before."""
    source = rows_file(QUESTIONS)
    assert not job(source, name, stop=after_a_part()).complete
    owner = {"_find": begin, "lock": Output}.get(seen, manifest.Manifest)
    look = getattr(owner, seen)

    def late(*arguments):
        monkeypatch.setattr(owner, seen, look)
        if seen in ("_find", "take"):  # after it has looked, and before
            result = look(*arguments)
            job(source, name)
            return result
        job(source, name)
        return look(*arguments)

    monkeypatch.setattr(owner, seen, late)
    assert job(source, name).rows_now == 0
    job(source, f"expected.{name}")
    got, expected = tmp_path / name, tmp_path / f"expected.{name}"
    assert files(got) == files(expected) if name == "out" else got.read_bytes() == expected.read_bytes()
    names = (
        ["expected.out", "out"]
        if name == "out"
        else [f"{e}{name}{m}" for e in ("expected.", "") for m in ("", ".manifest.json")]
    )
    assert sorted(os.listdir(tmp_path)) == sorted([*names, "rows.jsonl"])


def test_what_another_process_writes_stays(job, rows_file, tmp_path):
    """Only who has the lock removes what was left behind."""
    source = rows_file(QUESTIONS)
    assert not job(source, stop=after_a_part()).complete
    for name in (".part-00001.jsonl.tmp", "part-00001.jsonl", "part-00007.jsonl", "._manifest.json.tmp"):
        (tmp_path / "out" / name).write_text("half")
    before = sorted(os.listdir(tmp_path / "out"))
    with Output(str(tmp_path / "out")).lock("_manifest.json"):
        with pytest.raises(ValueError, match="another process is writing it"):
            job(source)
        assert sorted([*before, "._manifest.json.lock"]) == sorted(os.listdir(tmp_path / "out"))
    job(source)
    job(source, "expected")
    assert files(tmp_path / "out") == files(tmp_path / "expected")
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(tmp_path / "expected"))
