"""`jaxinfer compile`, and what is made of the folder by another process."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from jaxinfer.demo import MODEL_DIR
from tests.plan.test_roofline import CONFIG

FEW = ["--max-num-seqs", "1", "--max-num-batched-tokens", "4", "--max-model-len", "16"]
COMMAND = [sys.executable, "-m", "jaxinfer"]
FRESH = {"XLA_FLAGS": "", "JAXINFER_CACHE_DIR": "off"}


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | {"head_dim": 128, "hidden_size": 256}))
    return folder


@pytest.mark.slow
def test_generating_with_it(cli, tmp_path):
    """In processes of their own: nothing is compiled but by the first one."""
    out = tmp_path / "programs"
    few = ["--max-num-seqs", "1", "--max-num-batched-tokens", "32"]
    done = subprocess.run(
        [*COMMAND, "compile", MODEL_DIR, *few, "-o", out, "--json"],
        capture_output=True,
        text=True,
        env=os.environ | FRESH,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert (figures["programs"], figures["topology"]) == (13, None)
    assert figures["bytes"] == sum(file.stat().st_size for file in out.glob("*.xla"))
    done = subprocess.run(
        [*COMMAND, "generate", "--compiled", out, "What is 27 + 45?"],
        capture_output=True,
        text=True,
        env=os.environ | FRESH | {"JAX_LOG_COMPILES": "1"},
    )
    assert (done.returncode, done.stdout) == (0, " 27 + 45 = 72.\n")
    assert "Compiling" not in done.stderr
    assert "compiled" not in done.stderr.replace(str(out), "")


@pytest.mark.slow
def test_killed(model, tmp_path):
    """What is left is not taken for a folder of programs, and is gone after the next time."""
    out = tmp_path / "programs"
    command = [*COMMAND, "compile", model, *FEW, "-o", out]
    process = subprocess.Popen(command, env=os.environ | FRESH, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    while not list(tmp_path.glob("*.tmp/*.xla")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not out.exists()
    assert not list(tmp_path.rglob("manifest.json"))
    assert subprocess.run(command, env=os.environ | FRESH, capture_output=True).returncode == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model", "programs"]


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e-1", "v5e-4"])
def test_for_a_slice(cli, model, tmp_path, topology):
    pytest.importorskip("libtpu")
    out = tmp_path / "programs"
    code, stdout, err = cli("compile", model, "--topology", topology, *FEW, "-o", out)
    assert code == 0, err
    assert stdout.startswith("13 programs, ")
    manifest = json.loads((out / "manifest.json").read_text())
    environment = manifest["environment"]
    assert environment["device"] == "TPU v5 lite"
    assert len(environment["devices"]) == int(topology[-1])
    assert manifest["options"]["mesh"].endswith(f"tensor={topology[-1]}")
    code, stdout, err = cli("generate", "--compiled", out, "--max-tokens", "1", "a")
    assert code == 0
    assert f"not used: compiled for {topology[-1]} devices of TPU v5 lite, and this is cpu" in err


@pytest.mark.slow
def test_a_deployment(cli, model, tmp_path):
    """A file says all of it: the model, the options and the slice; what is given comes first."""
    pytest.importorskip("libtpu")
    file = tmp_path / "small.yaml"
    file.write_text(f"model: {model}\ntopology: v5e-1\nmax_num_seqs: 1\nmax_num_batched_tokens: 4\nmax_model_len: 32\n")
    out = tmp_path / "programs"
    code, stdout, _ = cli("compile", file, "--max-model-len", "16", "-o", out, "--json")
    assert (code, json.loads(stdout)["topology"]) == (0, "v5e-1")
    assert json.loads((out / "manifest.json").read_text())["options"]["max_model_len"] == 16


@pytest.mark.slow
def test_for_several_hosts(cli, model, tmp_path):
    """One process compiles for all of them."""
    pytest.importorskip("libtpu")
    (model / "config.json").write_text(json.dumps(CONFIG | {"num_attention_heads": 16, "hidden_size": 256}))
    out = tmp_path / "programs"
    asked = ("compile", model, *FEW, "--topology", "v5e-16", "--mesh", "tensor=16", "-o", out)
    assert cli(*asked).code == 0
    devices = json.loads((out / "manifest.json").read_text())["environment"]["devices"]
    assert len(devices) == 16
    assert {device.split(" at ")[0].split(" of ")[1] for device in devices} == {f"process {n}" for n in range(4)}


def test_what_does_not_fit(cli, model, tmp_path):
    pytest.importorskip("libtpu")
    large = {"num_hidden_layers": 48, "hidden_size": 8192, "intermediate_size": 28672}
    (model / "config.json").write_text(json.dumps(CONFIG | large))
    code, out, err = cli("compile", model, "--topology", "v5e-1", "-o", tmp_path / "x")
    assert (code, out) == (1, "")
    assert "v5e-1: needs " in err
    assert (
        "programs of GPUs are compiled where they are" in cli("compile", model, "--topology", "h100", "-o", "x").error()
    )
    assert not (tmp_path / "x").exists()


def test_mistakes(cli, model, tmp_path):
    assert "no model is named" in cli("compile", "-o", tmp_path / "x").error()
    assert "Missing option '--output'" in cli("compile", model).error()
    assert "--compiled is what other commands take" in cli("compile", model, "-o", "x", "--compiled", "y").error()
    assert "topology 'v5e-3' is not known" in cli("compile", model, "-o", "x", "--topology", "v5e-3").error()
    slice_of_hosts = cli("compile", model, "-o", "x", "--topology", "v5e-16", "--coordinator", "here:1")
    message = "topology is 'v5e-16': that is compiled for by one process, without --coordinator"
    assert slice_of_hosts.error() == message
    assert "max_model_len is 9999" in cli("compile", model, "-o", "x", "--max-model-len", 9999).error()
    taken = "is there already, and is no folder of compiled programs"
    assert taken in cli("compile", model, *FEW, "-o", model).err
    (tmp_path / "dangling").symlink_to("nowhere")
    for name, problem in {
        tmp_path / "dangling": "is there already",
        tmp_path / ("n" * 256): "File name too long",
        "a::b": "a URL within another",
        "gs:/bucket/x": "has lost a slash",
        "memory://x": "is gone when the command ends",
    }.items():
        assert problem in cli("compile", model, *FEW, "-o", name).err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["dangling", "model"]
    assert "no manifest.json" in cli("generate", "--compiled", tmp_path, "a").error()
