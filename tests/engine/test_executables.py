"""Programs that an earlier start compiled: nothing is traced or compiled again, and nobody else's are read."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import pytest

from jaxinfer import LLM, SamplingParams, private_folder
from jaxinfer.compile_cache import executables_folder, without_compile_cache
from jaxinfer.engine import executables, load, serialized
from jaxinfer.engine.background import running
from jaxinfer.engine.executables import ExecutableCache, open_executables
from jaxinfer.engine.load import local_programs
from jaxinfer.private_folder import DIGEST, PrivateFolder
from tests import kept as kept_programs
from tests.devices import simulated
from tests.engine.test_compiled import SCRIPT
from tests.models.test_families import reference

OPTIONS = {"max_num_seqs": 1, "max_num_batched_tokens": 32, "max_model_len": 64, "page_size": 8}
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
KEY = "decode", 1


def start(model, cache, **options):
    """What a process of its own says of its start."""
    flags = {"XLA_FLAGS": simulated(1), "JAXINFER_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", SCRIPT, str(model), json.dumps(OPTIONS | options)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | flags)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.fixture(scope="module")
def model(checkpoints):
    return checkpoints("llama").folder


@pytest.fixture
def alone(monkeypatch):
    """JAX keeps nothing."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    with without_compile_cache():
        yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture(scope="module")
def programs(model):
    with jax.default_device(jax.devices()[0]):
        return local_programs(json.loads((model / "config.json").read_text()), OPTIONS)[0]


@pytest.fixture
def kept(alone, programs, tmp_path):
    """With one program."""
    cache = open_executables(tmp_path, programs)
    assert cache.fetch(programs, KEY) is None
    cache.store(programs, KEY, kept_programs._lower(programs[KEY]).compile())
    assert cache.fetch(programs, KEY) is not None
    assert cache.loaded == 1
    return cache


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def generated(model):
    """Tokens; how many programs were compiled, and how many found."""
    with LLM(model, **OPTIONS) as llm:
        outputs = llm.generate([[1, 2, 3], [4, 5, 6, 7]], GREEDY, use_tqdm=False)
        while running():  # they are written by another thread
            time.sleep(0.01)
        runner = llm.engine.runner
        return [output.outputs[0].token_ids for output in outputs], runner.compilations, runner._kept.loaded


def test_the_second_start_compiles_nothing(model, tmp_path):
    first, _ = start(model, tmp_path)
    assert first["compilations"] >= 4
    assert first["compiled"] >= 4
    second, stderr = start(model, tmp_path)
    assert (second["compilations"], second["compiled"], second["traced"], stderr) == (0, 0, 0, "")
    assert not second["flax"]
    assert second["tokens"] == first["tokens"]
    other, _ = start(model, tmp_path, quantization="int8")
    assert other["compilations"] == first["compilations"]
    assert len(list((tmp_path / "executables").iterdir())) == 2


@pytest.mark.slow
def test_what_calls_lapack(checkpoints, tmp_path, monkeypatch):
    """JAX finds its functions when a program is lowered: without that, one that is read crashed."""
    monkeypatch.setenv("JAXINFER_CPU_KERNELS", "none")  # which call none of them
    folder = reference(checkpoints.root, "qwen3_next", "small").folder
    (first, _), (second, _) = (start(folder, tmp_path, max_num_batched_tokens=64) for _ in range(2))
    assert any(serialized.LAPACK in file.read_bytes() for file in (tmp_path / "executables").rglob("*.xla"))
    assert (second["compilations"], second["tokens"]) == (0, first["tokens"])


def test_an_engine_finds_them_and_goes_on_without(model, alone, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("JAXINFER_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(load, "open_executables", open_executables)
    expected, compilations, _ = generated(model)
    assert generated(model) == (expected, 0, compilations)
    for path in files(tmp_path):
        path.write_bytes(path.read_bytes()[:-100])
    assert generated(model) == (expected, compilations, 0)
    assert caplog.text.count("it is damaged; it is removed, and the program compiled now") == compilations
    assert generated(model) == (expected, 0, compilations)  # they were written anew


@pytest.mark.parametrize(
    "changes", [{"page_size": 4}, {"max_num_seqs": 3}, {"quantization": "int8"}, {"dtype": "bfloat16"}]
)
def test_what_is_not_the_same_is_elsewhere(model, programs, changes, tmp_path):
    with jax.default_device(jax.devices()[0]):
        other, _ = local_programs(json.loads((model / "config.json").read_text()), OPTIONS | changes)
    assert open_executables(tmp_path, other).own != open_executables(tmp_path, programs).own


def test_nor_is_that_of_other_sources_or_machines(programs, tmp_path, monkeypatch):
    before = open_executables(tmp_path, programs).own
    assert open_executables(tmp_path, programs).own == before
    with monkeypatch.context() as patch:
        patch.setattr(serialized, "_source", lambda: "changed")
        assert open_executables(tmp_path, programs).own != before
    monkeypatch.setattr(serialized, "cpu_features", lambda: ["avx1024"])
    assert open_executables(tmp_path, programs).own != before


class Run:
    """What pickle would call."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("damage", ["truncated", "a bit", "empty", "foreign"])
def test_damaged(kept, programs, caplog, damage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (path,) = files(kept.folder.path)
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    foreign = b"x" * DIGEST + pickle.dumps(Run())
    path.write_bytes({"truncated": content[:-100], "a bit": content, "empty": b"", "foreign": foreign}[damage])
    assert kept.fetch(programs, KEY) is None
    assert f"{path}: it is damaged; it is removed, and the program compiled now" in caplog.text
    assert not path.exists()
    assert not (tmp_path / "ran").exists()


def test_of_another_jax(kept, programs, caplog):
    """The digest is right, and JAX can't read it."""
    (path,) = files(kept.folder.path)
    path.write_bytes(hashlib.sha256(b"old").digest() + b"old")
    assert kept.fetch(programs, KEY) is None
    assert "JAX can't read it" in caplog.text
    assert not path.exists()


def test_a_link_is_not_followed(kept, programs, caplog, tmp_path):
    (path,) = files(kept.folder.path)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert kept.fetch(programs, KEY) is None
    assert "the program is compiled now" in caplog.text


def writable(folder):
    folder.chmod(0o770)


def linked(folder):
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to(folder.with_name("elsewhere"))


def writable_above(folder):
    folder.parent.chmod(0o777)


def a_file(folder):
    folder.rmdir()
    folder.touch()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (writable, "others may use it (mode 0770): remove it, or chmod 700"),
        (linked, "it is a link, or no folder; remove it"),
        (writable_above, "others may write in "),
        (a_file, "File exists"),
    ],
)
def test_where_others_can_write(programs, caplog, tmp_path, change, why):
    assert open_executables(tmp_path, programs) is not None
    change(tmp_path / "executables")
    assert open_executables(tmp_path, programs) is None
    assert f"{tmp_path / 'executables'} is not used for compiled programs: {why}" in caplog.text


def test_of_another_user(programs, caplog, tmp_path, monkeypatch):
    user = os.getuid()
    assert open_executables(tmp_path, programs) is not None
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    assert open_executables(tmp_path, programs) is None
    assert f"it belongs to user {user}, and this is user {user + 1}" in caplog.text


def test_on_a_shared_file_system(programs, caplog, tmp_path, monkeypatch):
    kinds = {"/": "ext4", str(tmp_path): "nfs4"}
    mounts = [SimpleNamespace(mountpoint=folder, fstype=kind) for folder, kind in kinds.items()]
    monkeypatch.setattr(private_folder.psutil, "disk_partitions", lambda all: mounts)
    assert open_executables(tmp_path, programs) is None
    assert "it is on a file system that other machines share (nfs4): set JAXINFER_CACHE_DIR to a local" in caplog.text


def test_a_full_disk(kept, programs, caplog, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    (path,) = files(kept.folder.path)
    path.unlink()
    monkeypatch.setattr(private_folder.os, "replace", full)
    kept.store(programs, KEY, kept_programs._lower(programs[KEY]).compile())
    assert "No space left on device; the program is not kept for the next start" in caplog.text
    assert not files(kept.folder.path)


def test_those_used_longest_ago_go(programs, tmp_path, monkeypatch):
    monkeypatch.setattr(executables, "MOST", 2)
    for age, name in enumerate(("a", "b", "c", "d")):
        (tmp_path / "executables" / name).mkdir(parents=True, mode=0o700)
        os.utime(tmp_path / "executables" / name, (1000 - age, 1000 - age))
    (tmp_path / "executables").chmod(0o700)
    open_executables(tmp_path, programs)
    assert sorted(path.name for path in (tmp_path / "executables").iterdir()) == ["a", "b"]


def test_where_jax_keeps_them(alone, monkeypatch, tmp_path):
    """At a URL, where somebody has told JAX to, and nowhere."""
    monkeypatch.setenv("JAXINFER_CACHE_DIR", str(tmp_path))
    assert executables_folder() == tmp_path
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    assert executables_folder() is None
    ExecutableCache(PrivateFolder(tmp_path / "own"), "").store(
        None, None, None
    )  # what came out of JAX's cache is not written
    jax.config.update("jax_compilation_cache_dir", None)
    for name in ("gs://bucket/programs", "off"):
        monkeypatch.setenv("JAXINFER_CACHE_DIR", name)
        assert executables_folder() is None


def test_two_threads_are_without_jaxs_cache():
    """The first one to end does not switch it on for the other."""
    before = jax.config.jax_enable_compilation_cache
    one, other = without_compile_cache(), without_compile_cache()
    with one:
        other.__enter__()
    assert not jax.config.jax_enable_compilation_cache
    other.__exit__(None, None, None)
    assert jax.config.jax_enable_compilation_cache == before
