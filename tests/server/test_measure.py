"""`jaxinfer bench serve`."""

import contextlib
import http.server
import json
import threading
import time


def test_a_server_is_measured(server, cli):
    command = ["bench", "serve", server.url, "--num-prompts", "6", "--input-len", "5", "--output-len", "9", "--json"]
    figures = json.loads(cli(*command, "--request-rate", "200", "--goodput", "ttft:60000").out)
    assert figures["completed"] == 6
    assert figures["request_goodput"] == figures["request_throughput"]
    assert abs(figures["output_throughput"] / figures["request_throughput"] - 9) < 1e-6
    assert figures["median_ttft_ms"] <= figures["median_e2el_ms"]
    assert "--goodput" in cli("bench", "serve", server.url, "--goodput", "x:1").error()
    assert "404" in cli("bench", "serve", f"{server.url}/nowhere").error()


@contextlib.contextmanager
def answering(post):
    """The URL of a server of one model that answers completions so."""

    class Stub(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            post(self)

        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"data": [{"id": "stub"}]}).encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stub) as stub:
        threading.Thread(target=stub.serve_forever).start()
        try:
            yield f"http://127.0.0.1:{stub.server_port}"
        finally:
            stub.shutdown()


def test_so_many_at_a_time(cli):
    """What waits for a place has not come yet."""
    open_now, most, lock = 0, [], threading.Lock()

    def slowly(stub):
        nonlocal open_now
        with lock:
            open_now += 1
            most.append(open_now)
        time.sleep(0.1)
        with lock:
            open_now -= 1
        stub.send_response(200)
        stub.end_headers()
        event = {"choices": [{"text": "a", "finish_reason": "length"}], "usage": {"completion_tokens": 1}}
        stub.wfile.write(f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n".encode())

    with answering(slowly) as url:
        command = "bench", "serve", url, "--num-prompts", "8", "--json"
        figures = json.loads(cli(*command, "--output-len", "1", "--max-concurrency", "2").out)
    assert max(most) == 2
    assert figures["duration"] > 0.4
    assert figures["median_e2el_ms"] < 1000 * figures["duration"] / 2


def test_answers_that_are_broken_off(cli):
    def half(stub):
        stub.send_response(200)
        stub.end_headers()
        for count in (1, 2, 3):
            event = {"choices": [{"text": "a", "finish_reason": None}], "usage": {"completion_tokens": count}}
            stub.wfile.write(f"data: {json.dumps(event)}\n\n".encode())

    with answering(half) as url:
        command = "bench", "serve", url, "--num-prompts", "2"
        assert "broken an answer off after 3 of 9 tokens" in cli(*command, "--output-len", "9").error()
