"""What processes say to each other, and that none of them goes on alone. JAX is not started."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.distributed.test_rendezvous import free_port

SECONDS = 60  # for what takes one, on a busy machine


class Members:
    """Processes of a group, by rank."""

    def __init__(self, *acts, timeout=30.0):
        port = str(free_port())
        command = [sys.executable, "-m", "tests.distributed.member", port, str(len(acts))]
        self.processes = [
            subprocess.Popen(
                [*command, str(rank), str(timeout), *act.split()],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank, act in enumerate(acts)
        ]

    def __enter__(self):
        for process in self.processes:
            output = b""  # and not a byte more: what comes after is for communicate
            while not output.endswith(b"\n") and (byte := os.read(process.stdout.fileno(), 1)):
                output += byte
            assert output == b"joined\n", process.communicate()
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.communicate()

    def ends(self):
        """(exit code, stdout, stderr) of each."""
        ended = []
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                out, err = process.communicate(timeout=SECONDS)
                ended.append((process.returncode, out, err))
        return ended


def test_values_and_commands_and_the_end():
    with Members("gather lead lead", "gather follow", "gather follow") as members:
        values = str([{"rank": 0}, {"rank": 1}, {"rank": 2}]) + "\n"
        assert members.ends() == [(0, values, ""), *[(0, values + "hello\nhello\n", "")] * 2]


def test_followers_end_wherever_they_are():
    began = time.monotonic()
    with Members("0", f"{10 * SECONDS}") as members:
        assert [code for code, _, _ in members.ends()] == [0, 0]
    assert time.monotonic() - began < SECONDS


def test_what_differs_is_said_by_all():
    with Members("agree", "agree", "agree") as members:
        for code, _, err in members.ends():
            assert code == 1
            assert err.splitlines()[-1] == (
                "ValueError: mesh is 'tensor=1' in process 1 and 'tensor=0' in process 0: all hosts need the "
                "same program, model and options"
            )


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_process_ends_the_others(victim, how):
    """A killed one's connections break, a frozen one says nothing any more."""
    with Members("900", "900", "900", timeout=1.5 if how == signal.SIGSTOP else 900.0) as members:
        members.processes[victim].send_signal(how)
        for rank, process in enumerate(members.processes):
            if rank != victim:
                _, err = process.communicate(timeout=SECONDS)
                assert process.returncode == 3
                assert err.count("\n") == 1
                why = "the connection was closed" if how == signal.SIGKILL else "it said nothing for 1.5 s"
                assert err.startswith(f"jaxinfer: error: process {rank} of 3: process {victim} of 3, at 127.0.0.1, is")
                assert f"lost: {why}. Without it the others can't go on; start the program again" in err


def test_a_process_that_takes_nothing_in():
    """Process 0 waits to send, and does not wait forever."""
    with Members("fill fill", "900", timeout=1.5) as members:
        members.processes[1].send_signal(signal.SIGSTOP)
        _, err = members.processes[0].communicate(timeout=SECONDS)
        assert members.processes[0].returncode == 3
        assert "process 1 of 2, at 127.0.0.1, is lost: " in err


@pytest.mark.parametrize("who", [0, 1])
def test_a_failure_is_told(who):
    acts = ["900"] * 3
    acts[who] = "fail 0.2"
    with Members(*acts) as members:
        for rank, (code, _, err) in enumerate(members.ends()):
            assert (code, err) == ((0, "") if rank == who else (3, f"jaxinfer: error: process {rank} of 3: no luck\n"))


def test_one_that_failed_and_does_not_end():
    """Its signs of life are no reason to wait for it longer."""
    with Members("900", "fail 900", timeout=1.5) as members:
        _, err = members.processes[0].communicate(timeout=SECONDS)
        assert (members.processes[0].returncode, err) == (3, "jaxinfer: error: process 0 of 2: no luck\n")
