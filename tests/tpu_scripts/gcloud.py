"""A stand-in for gcloud: one queued resource and its VM in a folder, which say and do what `plan.json` has for them.

Knows the commands and options that it says it knows and no others, and writes down each call. plan.json is a list with
an object for each VM that is created: `states`, of the queued resource, one for each time that somebody looks; then it
is ACTIVE, and the VM READY. `scp` and `ssh`: what the next calls do, a list: an exit code; "preempted"; "run": the
command, for the user of the VM; "killed": the same, and the VM is preempted when there are a few parts. Then "run".
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WIDE = {"--zone", "--project", "--quiet", "--verbosity"}
OPTIONS = {
    "queued-resources create": {"--node-id", "--accelerator-type", "--runtime-version", "--spot", "--async"},
    "queued-resources describe": {"--format"},
    "queued-resources delete": {"--force"},
    "tpu-vm describe": {"--format"},
    "tpu-vm scp": {"--worker"},
    "tpu-vm ssh": {"--command", "--worker"},
}
FOLDER = Path(os.environ["FAKE_GCLOUD"])
HOME = FOLDER / "home"  # of the VM's user


def fail(message: str, code: int = 1) -> int:
    print(f"ERROR: (gcloud.compute.tpus) {message}", file=sys.stderr)
    return code


def lose_disk() -> None:
    if HOME.exists():
        HOME.rename(FOLDER / f"lost-{time.monotonic_ns()}")


def preempt(state: dict[str, Any]) -> int:
    state.update(resource="SUSPENDED", vm="PREEMPTED")
    lose_disk()
    return 255


def ssh(command: str, what: Any, state: dict[str, Any]) -> int:
    if what == "preempted":
        return preempt(state)
    if isinstance(what, int):
        return what
    if "uv pip install" in command:  # which needs a network
        if not (HOME / "jaxinfer-venv").exists():
            (HOME / "jaxinfer-venv").symlink_to(sys.prefix)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: None)  # what is meant for the VM's processes, by their command lines
    process = subprocess.Popen(["bash", "-c", command], cwd=HOME, start_new_session=True)
    while what == "killed" and process.poll() is None:
        if len(list(FOLDER.glob("answers/part-*"))) > 2:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return preempt(state)
        time.sleep(0.01)
    return process.wait()


def call(command: str, name: str, options: dict[str, str], state: dict[str, Any]) -> int:
    if command == "queued-resources create":
        if state["resource"]:
            return fail("ALREADY_EXISTS: Requested entity already exists")
        plan = json.loads((FOLDER / "plan.json").read_text())
        state.update(plan[min(state["created"], len(plan) - 1)], resource="ACTIVE", vm="READY")
        state["created"] += 1
        HOME.mkdir()
        return 0
    if not state["resource"]:
        return fail(f"NOT_FOUND: Resource 'projects/p/locations/z/queuedResources/{name}' was not found")
    if command == "queued-resources describe":
        assert options["--format"] == "value(state.state)"
        states = state.get("states", [])
        print(states[0] if states else state["resource"])
        del states[1 if states[:1] == ["FAILED"] else 0 : 1]  # that is how it stays
        return 0
    if command == "tpu-vm describe":
        assert options["--format"] == "value(state)"
        print(state["vm"])
        return 0
    if command == "queued-resources delete":
        lose_disk()
        created = state["created"]
        state.clear()
        state.update(created=created, resource=None)
        return 0
    if state["resource"] != "ACTIVE" or state["vm"] != "READY":
        return fail("the VM is not there")
    kind = command.split()[1]
    what = state[kind].pop(0) if state.get(kind) else "run"
    if kind == "scp":
        return preempt(state) if what == "preempted" else what if isinstance(what, int) else 0
    return ssh(options["--command"], what, state)


def main() -> int:
    arguments = sys.argv[1:]
    with open(FOLDER / "calls.jsonl", "a") as file:
        file.write(json.dumps(arguments) + "\n")
    assert arguments[:2] == ["compute", "tpus"]
    command = " ".join(arguments[2:4])
    if "--" in arguments:  # for ssh itself: a tunnel, which is there until it is killed
        assert arguments[arguments.index("--") + 1 :][:2] == ["-N", "-L"]
        signal.pause()
    words = [word for word in arguments[4:] if not word.startswith("--")]
    options = dict(word.split("=", 1) if "=" in word else (word, "") for word in arguments[4:] if word.startswith("--"))
    if unknown := options.keys() - OPTIONS[command] - WIDE:
        return fail(f"unrecognized arguments: {unknown}", 2)
    if options["--zone"] != "z":
        return fail("PERMISSION_DENIED: Permission denied on 'locations/y' (or it may not exist).")
    file = FOLDER / "state.json"
    state = json.loads(file.read_text()) if file.exists() else {"created": 0, "resource": None}
    code = call(command, words[-1].split(":")[0], options, state)
    file.write_text(json.dumps(state))
    return code


if __name__ == "__main__":
    sys.exit(main())
