"""`jaxinfer convert`: what it writes is the same model, is whole or not there, and loads everywhere."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from jaxinfer import LLM
from jaxinfer.calibrate import calibrate
from jaxinfer.checkpoint import remote
from jaxinfer.checkpoint.hub import resolve
from jaxinfer.checkpoint.open import load_weights, open_weights
from jaxinfer.convert import convert
from jaxinfer.demo import MODEL_DIR
from jaxinfer.models.model import AbstractModel
from jaxinfer.text.tokenizer import load_tokenizer

OPTIONS = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "page_size": 8}
PROMPTS = [[5, 17, 200, 33], list(range(40, 100))]


def logprobs(model, **options):
    with LLM(model, **OPTIONS, **options) as llm:
        return [output.logprobs for output in llm.score(PROMPTS)]


def test_the_same_model(checkpoints, cli, tmp_path):
    """Split over other devices than it was written from."""
    source, output = checkpoints("llama").folder, tmp_path / "new" / "int8"
    code, stdout, err = cli("convert", source, output, "--quantization", "int8", "--mesh", "tensor=4", "--json")
    assert (code, err) == (0, "")
    figures = json.loads(stdout)
    assert figures["precision"] == "int8, float32"
    assert figures["restore_ratio"] == pytest.approx(figures["restore_seconds"] / figures["load_seconds"])
    for array, other in zip(
        logprobs(output, mesh="fsdp=2,tensor=2"), logprobs(source, quantization="int8"), strict=True
    ):
        np.testing.assert_allclose(array, other, atol=1e-5)
    assert (
        "the checkpoint was converted, to 'int8'" in cli("generate", "-m", output, "--quantization", "fp8", "a").error()
    )
    assert f"output {output}: is there already" in cli("convert", source, output).error()
    assert not list((tmp_path / "new").glob(".*"))


def test_converting_what_was_converted(checkpoints, cli, tmp_path):
    """In the dtype that it has, with the tokenizer and a license beside it."""
    cli("convert", MODEL_DIR, tmp_path / "one")
    (tmp_path / "one" / "LICENSE").write_text("free")
    code, stdout, _ = cli("convert", tmp_path / "one", tmp_path / "two")
    assert code == 0
    assert "bytes of weights in bfloat16" in stdout
    compared = re.search(r"restoring ([\d.]+) s: ([\d.]+) times as (fast|long) as loading", stdout)
    assert float(compared[2]) >= 1  # as fast or as long, whichever it is
    names = [sorted(file.name for file in (tmp_path / name).iterdir()) for name in ("one", "two")]
    assert names[0] == names[1]
    assert cli("generate", "-m", tmp_path / "two", "What is 27 + 45?").out == " 27 + 45 = 72.\n"
    assert (
        "was converted without"
        in cli("convert", tmp_path / "one", tmp_path / "three", "--quantization", "int8").error()
    )
    assert sorted(file.name for file in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.parametrize("scheme", ["int8", "int4", pytest.param("int8-w8a8", marks=pytest.mark.slow), "fp8"])
def test_there_and_back(tmp_path, scheme):
    """The same bits by way of compressed-tensors' format, and of what was quantized before in Orbax's."""

    def held(folder, quantization=None):
        model = AbstractModel.from_config(json.loads((folder / "config.json").read_text()), "bfloat16", quantization)
        with open_weights(folder) as weights:
            return load_weights(model, weights, jax.devices()[0])

    convert(MODEL_DIR, tmp_path / "hf", format="hf", quantization=scheme, show_progress=False)
    done = convert(tmp_path / "hf", tmp_path / "orbax", show_progress=False)
    assert done.precision == f"{scheme}, bfloat16"
    convert(tmp_path / "orbax", tmp_path / "again", format="hf", show_progress=False)
    expected = held(MODEL_DIR, scheme)
    for name in ("hf", "orbax", "again"):
        got = held(tmp_path / name)
        assert got.keys() == expected.keys()
        for key, array in expected.items():
            assert got[key].dtype == array.dtype
            assert np.asarray(got[key]).tobytes() == np.asarray(array).tobytes(), key


def test_by_its_url(cli, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "jaxinfer.json").write_text("{}")
    url = f"file://{tmp_path}/one"
    assert resolve(url) == tmp_path / "one"
    assert "no jaxinfer.json" in cli("generate", "-m", f"file://{tmp_path}/two", "a").error()
    assert "nosuch" in cli("generate", "-m", "nosuch://bucket/one", "a").error()
    assert "revisions are for hub ids" in cli("generate", "-m", url, "--revision", "x", "a").error()


def test_what_an_object_store_has(tmp_path, monkeypatch):
    """All but the weights comes here, and only once the manifest, which is written last, is there."""
    import fsspec

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/bucket/one/config.json", b"{}")
    fs.pipe_file("/bucket/one/weights/d/1", b"large")
    with pytest.raises(FileNotFoundError, match=r"memory://bucket/one: no jaxinfer\.json"):
        remote.fetch("memory://bucket/one/")
    manifest = b'{"format": 1, "files": {}, "tensors": {}}'
    fs.pipe_file("/bucket/one/jaxinfer.json", manifest)
    fs.pipe_file("/bucket/one/chat_templates/tool_use.jinja", b"{{ tools }}")
    fs.pipe_file("/bucket/one/other/x.json", b"{}")
    fs.pipe_file("/bucket/one/movie.mp4", b"large")
    for _ in range(2):
        folder = remote.fetch("memory://bucket/one/")
    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    assert files == ["chat_templates/tool_use.jinja", "config.json", "jaxinfer.json"]
    assert (folder / "jaxinfer.json").read_bytes() == manifest
    assert folder.name == "one"
    with open_weights(folder) as weights:
        assert weights.weights == "memory://bucket/one/weights"
    shutil.copytree(folder, tmp_path / "copy")
    with open_weights(tmp_path / "copy") as weights:  # which `fetch` has not made, whatever it contains
        assert weights.weights == str(tmp_path / "copy" / "weights")
    # What is there now is another folder, and who reads the old one goes on. What was damaged is made anew.
    fs.pipe_file("/bucket/one/config.json", b"{ }")
    changed = remote.fetch("memory://bucket/one")
    assert (changed / "config.json").read_bytes() == b"{ }"
    assert (folder / "config.json").read_bytes() == b"{}"
    (changed / "config.json").write_bytes(b"")
    assert remote.fetch("memory://bucket/one") == changed
    assert (changed / "config.json").read_bytes() == b"{ }"
    monkeypatch.setattr(remote, "MAX_JSON_BYTES", 20)
    with pytest.raises(ValueError, match=r"memory://bucket/one/jaxinfer\.json: has 41 bytes, and 20 are read"):
        remote.fetch("memory://bucket/one")


def test_fetched_by_several_at_once(tmp_path, monkeypatch):
    import fsspec

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fsspec.filesystem("memory").pipe_file("/bucket/many/jaxinfer.json", b"{}")
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: remote.fetch("memory://bucket/many"), range(40)))
    assert len({*folders}) == 1
    assert len(list((tmp_path / "jaxinfer" / "checkpoints").iterdir())) == 1


def test_two_to_one_output(tmp_path, monkeypatch):
    """The second begins while the first is reading, and is slow: whose folder it is in the end is whole."""
    import jaxinfer.convert

    output, real = tmp_path / "new", jaxinfer.convert.load_weights
    first = []

    def load_weights(*arguments):
        params = real(*arguments)
        if not first:
            first.append(True)
            convert(MODEL_DIR, output, format="hf", show_progress=False)
        return params

    monkeypatch.setattr(jaxinfer.convert, "load_weights", load_weights)
    with pytest.raises(OSError, match=r"new: another process has written it, .*: give another name"):
        convert(MODEL_DIR, output, format="hf", quantization="int8", show_progress=False)
    assert os.listdir(tmp_path) == ["new"]
    assert "quantization_config" not in json.loads((output / "config.json").read_text())
    with open_weights(output) as new, open_weights(MODEL_DIR) as old:
        for name in old.tensors:
            assert new.read(name).tobytes() == old.read(name).tobytes()


def model_with(folder, *files):
    """The packaged model, and more files in it."""
    shutil.copytree(MODEL_DIR, folder)
    for name in files:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("tools {{ tools | tojson }}")
    return folder


@pytest.mark.parametrize("format", ["hf", "orbax"])
def test_named_chat_templates_come_along(tmp_path, format):
    names = ("chat_templates/tool_use.jinja", "additional_chat_templates/rag.jinja")
    source = model_with(tmp_path / "model", *names, "assets/picture.json")
    convert(source, tmp_path / "new", format=format, show_progress=False)
    for name in names:
        assert (tmp_path / "new" / name).read_text() == "tools {{ tools | tojson }}"
    assert not (tmp_path / "new" / "assets").exists()
    templates = load_tokenizer(tmp_path / "new").chat_templates.templates
    assert templates.keys() >= {"default", "tool_use", "rag"}


def test_links_are_not_copied_from_elsewhere(tmp_path, monkeypatch):
    """What comes out may be published; what a downloaded folder links to was not meant."""
    source = model_with(tmp_path / "model")
    (tmp_path / "private").write_text("secret")
    (source / "LICENSE").symlink_to(tmp_path / "private")
    monkeypatch.setattr("jaxinfer.convert.load_weights", None)  # said before
    with pytest.raises(ValueError, match="LICENSE is a link that leads out of its folder"):
        convert(source, tmp_path / "new", format="hf", show_progress=False)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["run[1]", "n" * 250, "x/."])
def test_odd_names(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    convert(MODEL_DIR, name, show_progress=False)
    assert sorted(os.listdir(os.path.normpath(name))) == sorted(os.listdir(tmp_path / name))
    assert len(os.listdir(tmp_path)) == 1


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("memory://a/b", "Orbax writes folders and gs://, s3://"),
        ("https://127.0.0.1:9/b", "output https://127.0.0.1:9/b"),
        ("file://", "a name is missing"),
        ("dangling", "is there already"),
        ("a::b", "a URL within another"),
        ("gs:/bucket/b", "a URL that has lost a slash"),
        ("n" * 256, "File name too long"),
        ("[1]/b", r"Orbax can't use a folder called '[1]'"),
        ("a\\b", "Orbax can't use a folder called"),
    ],
)
def test_names_that_can_not_be(cli, tmp_path, monkeypatch, name, problem):
    """Said before a model is looked for, which may have to be downloaded."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises((ValueError, OSError), match=re.escape(problem)) as error:
        convert("me/not-there", name)
    assert "\n" not in str(error.value)
    assert problem in cli("convert", "me/not-there", name).error()
    command = ("quantize", "me/not-there", name, "--scheme", "int4", "--method", "gptq", "--data", "no.txt")
    assert problem in cli(*command).error()
    assert os.listdir(tmp_path) == ["dangling"]


@pytest.mark.slow
def test_killed(tmp_path):
    """Whenever that is, there is nothing with the name that was asked for; the next one leaves nothing else."""
    output = tmp_path / "new"
    command = [sys.executable, "-m", "jaxinfer", "convert", MODEL_DIR, output]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    while not list(tmp_path.glob(".new.*.tmp/weights*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not os.path.exists(output)
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert [file.name for file in tmp_path.iterdir()] == ["new"]


def test_mistakes(cli, tmp_path):
    assert "no such folder" in cli("convert", tmp_path / "no", tmp_path / "x").error()
    assert "quantization is 'int3'" in cli("convert", MODEL_DIR, tmp_path / "x", "--quantization", "int3").error()
    assert "is there already" in cli("convert", MODEL_DIR, tmp_path).error()
    assert "mesh is 'tensor=3'" in cli("convert", MODEL_DIR, tmp_path / "x", "--mesh", "tensor=3").error()
    assert "nosuch" in cli("convert", MODEL_DIR, "nosuch://bucket/x").error()
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_taken_and_ignored(tmp_path):
    """What is of running a model, and not of its weights, has no place here."""
    with pytest.raises(TypeError, match="kv_cache_dtype"):
        convert(MODEL_DIR, tmp_path / "new", kv_cache_dtype="int8")
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        convert(MODEL_DIR, tmp_path / "new", dtype="int8")
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        calibrate(MODEL_DIR, tmp_path / "new", ["one two"], scheme="int4", method="gptq", dtype="int8")
    assert not list(tmp_path.iterdir())
