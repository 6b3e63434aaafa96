"""Jobs in processes of their own, which are killed and started again."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from typing import Self

# Most of a start is importing, so that is done once: each job is a fork of a process that has imported everything and
# has done nothing else (there is no device yet, and no thread, NumPy's included).
SOURCE = """
import json, os, signal, sys, time
import jax, jaxinfer.batch.loop, jaxinfer.cli
assert len(os.listdir("/proc/self/task")) == 1
for line in sys.stdin:
    arguments, seconds = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open("/dev/null", os.O_WRONLY), 1)
        os._exit(jaxinfer.cli.main(arguments))
    end = time.monotonic() + seconds
    while (done := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        time.sleep(0.005)
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(done[1]), flush=True)
"""


class Jobs:
    """Runs command lines of jaxinfer, one at a time."""

    def __init__(self) -> None:
        environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SOURCE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, *arguments: object) -> float:
        """Runs one to its end; returns how many seconds it took."""
        begun = time.monotonic()
        assert self._run(arguments, 1000) == 0
        return time.monotonic() - begun

    def run_and_kill(self, rng: random.Random, seconds: float, *arguments: object) -> int:
        """Kills it after a random part of `seconds`, and starts it again, until it ends by itself; returns how often.

        Each time it may have a tenth more, so that this ends on a machine that has become slow.
        """
        kills = 0
        while (code := self._run(arguments, rng.uniform(0, seconds * 1.1**kills))) != 0:
            assert code == -signal.SIGKILL
            kills += 1
        return kills

    def _run(self, arguments: tuple[object, ...], seconds: float) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([[str(argument) for argument in arguments], seconds]) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()
