"""Runs each system in a process of its own and asks them in turn, so that a drift of the machine meets them alike."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any


class Peer:
    """A worker process that answers JSON lines: `{"do": ..., ...}` in, a result out. Its own prints go to stderr."""

    def __init__(self, script: str, *arguments: str, python: str = sys.executable):
        command = [python, str(Path(__file__).with_name(script)), *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self._process.pid
        self.ready = self._read()

    def ask(self, **question: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._process.args} ended with exit code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def serve(ready: dict[str, Any], answer: Any) -> None:
    """The worker's side: says `ready`, then answers until the parent closes the pipe."""
    out = sys.stdout
    sys.stdout = sys.stderr
    print(json.dumps(ready), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), file=out, flush=True)


def peak_bytes() -> int:
    """The most memory that this process has had resident."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def cpu_seconds(pid: int) -> float:
    """Of CPUs, that a process of this user has had so far, all its threads."""
    # Fields as `man 5 proc` numbers them: 14 and 15, in ticks; the second one is a name, which may have spaces.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def cpu_name() -> str:
    """As the system calls it, and what tells CPUs of one name apart."""
    info = Path("/proc/cpuinfo")
    pairs = (line.partition(":") for line in reversed(info.read_text().splitlines())) if info.exists() else ()
    fields = {name.strip(): value.strip() for name, _, value in pairs}
    if "model name" not in fields:
        return platform.processor()
    flags = fields.get("flags", "").split()
    level = next((level for level in ("avx512_bf16", "avx512f", "avx2") if level in flags), "")
    return f"{fields['model name']}, family {fields.get('cpu family')}, model {fields.get('model')}, {level}"
