"""The scripts that make, fill, use and delete a TPU VM, with a stand-in for gcloud, and each of them twice."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest

from jaxinfer.demo import MODEL_DIR
from tests.plan.test_roofline import CONFIG
from tests.tpu_scripts.test_batch import OPTIONS, SCRIPTS, Cloud

ZONE = ["--zone", "z", "--poll", "0"]
MAKE = [*OPTIONS, "--poll", "0"]


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


def words(cloud, command):
    """The calls of one of gcloud's commands."""
    calls = [json.loads(line) for line in (cloud.folder / "calls.jsonl").read_text().splitlines()]
    return [call for call in calls if call[3] == command]


@pytest.mark.slow
def test_from_nothing_to_an_answer_and_back(cloud):
    states = [{"states": ["ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING"]}]
    for _ in range(2):  # the second time there is nothing to do
        done = cloud.run("create.sh", "v", *MAKE, plan=states)
        assert done.returncode == 0, done.stderr
        assert "v is ready, and costs money until: tpu_scripts/delete.sh v --zone z" in done.stderr
    assert cloud.calls() == ["create"]
    assert "--spot" in words(cloud, "create")[0]
    for _ in range(2):
        done = cloud.run("install.sh", "v", *ZONE, "--with", "jax==0.10.2 libtpu==0.0.42.1")
        assert (done.returncode, done.stdout) == (0, "0.1.0\n"), done.stderr
    assert cloud.calls()[1:] == ["scp", "install", "job"] * 2
    assert all("--worker=all" in call for call in [*words(cloud, "scp"), *words(cloud, "ssh")])
    (command, *_) = [word for word in words(cloud, "ssh")[0] if word.startswith("--command=")]
    assert command.endswith(" './jaxinfer-source[tpu,gcs]' jax==0.10.2 libtpu==0.0.42.1")
    question = ["--model", MODEL_DIR, "What is 27 + 45?"]
    for _ in range(2):
        done = cloud.run("generate.sh", "v", *ZONE, "--", *question)
        assert (done.returncode, done.stdout) == (0, " 27 + 45 = 72.\n"), done.stderr
    assert cloud.left
    for _ in range(2):
        done = cloud.run("delete.sh", "v", *ZONE)
        assert (done.returncode, done.stderr) == (0, "delete.sh: v is gone\n")
    assert cloud.calls().count("delete") == 1
    assert not cloud.left


@pytest.mark.parametrize(
    ("plan", "code", "calls"),
    [
        ([{"states": ["PROVISIONING", "SUSPENDED"]}, {}], 0, ["create", "delete", "create"]),
        ([{"states": ["FAILED"]}], 3, ["create", "delete"] * 5),
    ],
)
def test_creating(cloud, plan, code, calls):
    done = cloud.run("create.sh", "v", *MAKE, "--on-demand", "--project", "p", plan=plan)
    assert (done.returncode, cloud.calls()) == (code, calls), done.stderr
    assert "--spot" not in words(cloud, "create")[0]
    assert "--project=p" in words(cloud, "create")[0]
    assert "delete.sh v --zone z --project p" in done.stderr


def test_ctrl_c(cloud):
    (cloud.folder / "plan.json").write_text(json.dumps([{"states": ["PROVISIONING"] * 1000}]))
    process = subprocess.Popen(
        ["bash", cloud.folder / "copy/tpu_scripts/create.sh", "v", *OPTIONS, "--poll", "0.1"],
        env=cloud.environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    while "WAITING" not in process.stderr.readline():
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "v may still come, and cost money: tpu_scripts/delete.sh v --zone z" in stderr


@pytest.mark.parametrize(("script", "more"), [("install.sh", []), ("serve.sh", []), ("generate.sh", ["--", "hello"])])
def test_a_vm_that_is_not_there(cloud, script, more):
    done = cloud.run(script, "v", *ZONE, *more)
    assert done.returncode == 3
    assert "v is not ready (NONE): tpu_scripts/create.sh" in done.stderr
    done = cloud.run(script, "v", "--zone", "y", "--poll", "0", *more)
    assert done.returncode == 3
    assert "gcloud can't say how v is: ERROR" in done.stderr


def test_what_fails_on_the_vm(cloud):
    assert cloud.run("create.sh", "v", *MAKE, plan=[{"ssh": [1]}]).returncode == 0
    assert cloud.run("install.sh", "v", *ZONE).returncode == 1
    assert cloud.run("install.sh", "v", *ZONE).returncode == 0
    done = cloud.run("generate.sh", "v", *ZONE, "--", "--model", "/nothing", "hello")
    assert done.returncode == 2
    assert "jaxinfer: error: /nothing" in done.stderr


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("create.sh", ["v", *MAKE]),
        ("install.sh", ["v", *ZONE]),
        pytest.param("generate.sh", ["v", *ZONE, "--", "--model", MODEL_DIR, "it's $HOME"], marks=pytest.mark.slow),
        ("delete.sh", ["v", *ZONE]),
    ],
)
def test_a_dry_run_prints_what_is_run(cloud, script, arguments):
    shown = cloud.run(script, *arguments, "--dry-run") if "--" not in arguments else None
    if shown is None:
        at = arguments.index("--")
        shown = cloud.run(script, *arguments[:at], "--dry-run", *arguments[at:])
    assert (shown.returncode, shown.stderr) == (0, "")
    assert not (cloud.folder / "calls.jsonl").exists()
    if script != "create.sh":
        cloud.run("create.sh", "v", *MAKE)
        (cloud.folder / "calls.jsonl").unlink()
    if script == "generate.sh":
        cloud.run("install.sh", "v", *ZONE)
        (cloud.folder / "calls.jsonl").unlink()
    cloud.run(script, *arguments)
    called = [json.loads(line) for line in (cloud.folder / "calls.jsonl").read_text().splitlines()]
    printed = [line for line in map(shlex.split, shown.stdout.splitlines()) if line[0] == "gcloud"]
    assert [[word for word in line[1:] if "tar.gz" not in word or "=" in word] for line in printed] == [
        [word for word in call if "tar.gz" not in word or "=" in word] for call in called if call[3] != "describe"
    ]


@pytest.mark.slow
def test_serving(cloud):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cloud.run("create.sh", "v", *MAKE)
    cloud.run("install.sh", "v", *ZONE, "--extras", "tpu,server")
    command = ["bash", cloud.folder / "copy/tpu_scripts/serve.sh", "v", *ZONE, "--port", str(port), "--", "--no-warmup"]
    process = subprocess.Popen(command, env=cloud.environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        while "serving jaxinfer-demo at" not in (line := process.stderr.readline()):
            assert process.poll() is None, line
        body = json.dumps({"prompt": "What is 27 + 45?"}).encode()
        url, headers = f"http://127.0.0.1:{port}/v1/completions", {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=240) as response:
            assert json.load(response)["choices"][0]["text"] == " 27 + 45 = 72."
        (tunnel,) = [call for call in words(cloud, "ssh") if "-L" in call]
        assert tunnel[-4:] == ["--", "-N", "-L", f"{port}:127.0.0.1:{port}"]
    finally:
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert (process.returncode, "shutting down" in stderr) == (130, True)
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port))
    assert cloud.left


@pytest.mark.slow
def test_plan_and_compile(cloud, tmp_path):
    pytest.importorskip("libtpu")
    cloud.environment["PATH"] = f"{os.path.dirname(sys.executable)}:{cloud.environment['PATH']}"
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 1}))
    small = ["--topology", "v5e-1", "--max-num-seqs", "1", "--max-num-batched-tokens", "4", "--max-model-len", "16"]
    out = tmp_path / "programs"
    done = cloud.run("plan_and_compile.sh", tmp_path, "--output", out, "--", *small)
    assert done.returncode == 0, done.stderr
    assert "of each chip" in done.stdout
    assert "needs: jax==" in done.stdout
    assert " libtpu==" in done.stdout
    assert json.loads((out / "manifest.json").read_text())["environment"]["device"] == "TPU v5 lite"
    assert not (cloud.folder / "calls.jsonl").exists()


def test_what_does_not_fit_is_not_compiled(cloud, tmp_path):
    fake = tmp_path / "bin/jaxinfer"
    fake.write_text('#!/bin/sh\necho "$@"\nexit 1\n')
    fake.chmod(0o755)
    done = cloud.run("plan_and_compile.sh", "c.yaml", "--output", "gs://b/out")
    assert (done.returncode, done.stdout) == (1, "plan c.yaml\n")
    done = cloud.run("plan_and_compile.sh", "c.yaml", "--output", "gs://b/out", "--dry-run", "--", "--mesh", "tensor=4")
    assert done.stdout.splitlines() == [
        "jaxinfer plan c.yaml --mesh tensor=4",
        "jaxinfer compile c.yaml --mesh tensor=4 --output=gs://b/out",
    ]


@pytest.mark.parametrize("script", sorted(file.name for file in SCRIPTS.glob("*.sh") if file.name != "common.sh"))
def test_help(cloud, script):
    for option in ("--help", "-h"):
        done = cloud.run(script, option)
        assert (done.returncode, done.stderr) == (0, "")
        assert f"tpu_scripts/{script} " in done.stdout
        assert "Exit codes: " in done.stdout
        assert "#" not in done.stdout
    assert not (cloud.folder / "calls.jsonl").exists()


@pytest.mark.parametrize(
    ("script", "arguments", "fact"),
    [
        ("create.sh", MAKE, "NAME is missing"),
        ("create.sh", ["v", "--zone", "z"], "TYPE is missing"),
        ("create.sh", ["v", *MAKE, "--", "x"], "there is nothing to come after --"),
        ("create.sh", ["v", *MAKE, "--keep"], "there is no option --keep"),
        ("install.sh", ["v"], "ZONE is missing"),
        ("install.sh", ["v", *ZONE, "--extras"], "--extras needs a value"),
        ("install.sh", ["v", *ZONE, "--type", "x"], "there is no option --type"),
        ("generate.sh", ["v", *ZONE], "after -- come the arguments of jaxinfer generate"),
        ("serve.sh", ["v", *ZONE, "--port", "0"], "--port is 0: it must be from 1 to 65535"),
        ("serve.sh", ["v", *ZONE, "--", "--port=1"], "--port comes before --, as the tunnel needs it, too"),
        ("delete.sh", ["v", "w", *ZONE], "both v and w are names"),
        ("delete.sh", ["v", "--zone", "z", "--poll", "x"], "--poll is x: it must be seconds"),
        ("plan_and_compile.sh", ["c.yaml"], "OUTPUT is missing"),
    ],
)
def test_mistakes(cloud, script, arguments, fact):
    done = cloud.run(script, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{script}: error: {fact}; see {script} --help\n"
    assert not (cloud.folder / "calls.jsonl").exists()


def test_without_gcloud(cloud):
    tools = cloud.folder / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "tr", "awk"):
        (tools / name).symlink_to(subprocess.check_output(["which", name], text=True).strip())
    cloud.environment["PATH"] = str(tools)
    done = subprocess.run(
        [tools / "bash", SCRIPTS / "delete.sh", "v", *ZONE], env=cloud.environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (
        2,
        "delete.sh: error: gcloud is not installed: https://cloud.google.com/sdk\n",
    )
