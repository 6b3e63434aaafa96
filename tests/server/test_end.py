"""How a server ends: with what runs done, or cut off, or with the engine's failure."""

import asyncio
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from unittest.mock import Mock

import httpx2 as httpx
import pytest

import jaxinfer
from jaxinfer.server import run
from jaxinfer.server.config import ServerConfig
from tests.refusals import line
from tests.settled import settled

COMPLETIONS = "/v1/completions"
LONG = {"prompt": "a", "max_tokens": 60, "ignore_eos": True, "stream": True}
CHAT = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 60, "ignore_eos": True, "stream": True}


def events(lines):
    return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]


@pytest.mark.parametrize(("seconds", "reason"), [(20, "length"), (0, "abort")])
def test_what_runs_may_end(serve, served_llm, slowly, seconds, reason):
    server = serve(drain_seconds=seconds)
    slow = slowly(served_llm)
    with httpx.Client(base_url=server.url, timeout=60) as client:
        with client.stream("POST", COMPLETIONS, json=LONG) as stream:
            lines = stream.iter_lines()
            first = next(lines)
            closing = threading.Thread(target=server.close)
            closing.start()
            if seconds:
                while client.get("/ready").status_code == 200:
                    time.sleep(0.01)
                assert client.post(COMPLETIONS, json=LONG).status_code == 503
                slow.stop()
            *_, last, done = events([first, *lines])
        closing.join()
    assert done == "[DONE]"
    assert json.loads(last)["choices"][0]["finish_reason"] == reason
    settled(served_llm)


def test_requests_that_came_before_the_end_are_answered():
    """A drained server stays while it answers 503 to what waited on its sockets."""
    server = run.Server(Mock(config=ServerConfig(), state="draining", active=0))
    for answered, ended in ((3, False), (9, False), (9, True)):
        server.server_state.total_requests = answered
        assert asyncio.run(server.on_tick(1)) is ended


@pytest.mark.parametrize(("path", "kind"), [(COMPLETIONS, "server_error"), ("/v1/messages", "api_error")])
def test_an_engine_that_fails_fails_its_requests_and_ends_the_server(serve, served_llm, slowly, path, kind):
    server = serve()
    slow = slowly(served_llm)
    with httpx.Client(base_url=server.url, timeout=60) as client:
        asked = LONG if path == COMPLETIONS else CHAT
        with client.stream("POST", path, json=asked) as stream:
            lines = stream.iter_lines()
            next(lines)
            slow.fail(RuntimeError("secret of the device"))
            error = json.loads(events(lines)[-1])["error"]
        assert error["type"] == kind
        assert "secret" not in error["message"]
    server._thread.join(20)
    assert not server._thread.is_alive()
    slow.stop()
    assert jaxinfer.serve(served_llm).close() is None  # the model is in order, and stays loaded


@pytest.mark.parametrize(("last", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_the_command(cli, monkeypatch, last, code):
    """With the exit code of that one."""
    service = Mock(config=ServerConfig(), state="ready", active=1)
    service.drain.side_effect = lambda: setattr(service, "state", "draining")

    def signals(server, sockets):
        for number in (signal.SIGTERM, last):
            server.handle_exit(number, None)

    monkeypatch.setattr("jaxinfer.cli.bench.BatchingOptions.load", lambda *_, **__: None)
    monkeypatch.setattr(run, "_tune_process", lambda: None)
    monkeypatch.setattr(run, "Service", lambda *_: service)
    monkeypatch.setattr(run.Server, "run", signals)
    assert cli("serve", "--port", "0").code == code
    assert service.close.called


@pytest.mark.slow
def test_signals(checkpoints):
    """SIGTERM ends the command, with what runs done."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jaxinfer", "serve", str(checkpoints("llama").folder), "--port", str(port), "-q"]
    with subprocess.Popen(
        [*command, "--max-num-seqs", "4", "--no-warmup"], env=os.environ | {"JAX_PLATFORMS": "cpu"}
    ) as process:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as client:
            for _ in range(3000):
                try:
                    client.get("/ready").raise_for_status()
                    break
                except httpx.HTTPError:
                    time.sleep(0.1)
            with client.stream("POST", COMPLETIONS, json=LONG) as stream:
                lines = stream.iter_lines()
                process.send_signal(signal.SIGTERM)
                assert events(lines)[-1] == "[DONE]"
        assert process.wait(60) == 0


def test_a_unix_socket(serve, tmp_path):
    """Only its owner can use it; it goes with the server, and one that was left over is replaced."""
    file = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(file))
    server = serve(uds=str(file))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    transport = httpx.HTTPTransport(uds=str(file))
    with httpx.Client(base_url="http://any.example", transport=transport, timeout=60) as client:
        assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
        assert client.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 1}).status_code == 200
    assert str(file) in line(lambda: serve(uds=str(file)))
    server.close()
    assert not file.exists()
    file.touch()
    assert str(file) in line(lambda: serve(uds=str(file)))
    assert file.exists()


def test_a_server_that_others_reach_needs_a_key(cli):
    assert "--no-api-key" in cli("serve", "--host", "0.0.0.0").error()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port}" in cli("serve", "--port", str(port)).error()
