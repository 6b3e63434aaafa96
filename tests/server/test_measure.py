"""`jaxinfer bench serve`."""

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


def test_so_many_at_a_time(cli):
    """What waits for a place has not come yet."""
    open_now, most, lock = 0, [], threading.Lock()

    class Slow(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            nonlocal open_now
            self.rfile.read(int(self.headers["Content-Length"]))
            with lock:
                open_now += 1
                most.append(open_now)
            time.sleep(0.1)
            with lock:
                open_now -= 1
            self.send_response(200)
            self.end_headers()
            event = {"choices": [{"text": "a", "finish_reason": "length"}], "usage": {"completion_tokens": 1}}
            self.wfile.write(f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n".encode())

        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"data": [{"id": "slow"}]}).encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow) as stub:
        threading.Thread(target=stub.serve_forever).start()
        try:
            command = "bench", "serve", f"http://127.0.0.1:{stub.server_port}", "--num-prompts", "8", "--json"
            figures = json.loads(cli(*command, "--output-len", "1", "--max-concurrency", "2").out)
        finally:
            stub.shutdown()
    assert max(most) == 2
    assert figures["duration"] > 0.4
    assert figures["median_e2el_ms"] < 1000 * figures["duration"] / 2


def test_answers_that_are_broken_off(cli):
    class Half(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            for count in (1, 2, 3):
                event = {"choices": [{"text": "a", "finish_reason": None}], "usage": {"completion_tokens": count}}
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())

        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"data": [{"id": "half"}]}).encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Half) as stub:
        threading.Thread(target=stub.serve_forever).start()
        try:
            command = "bench", "serve", f"http://127.0.0.1:{stub.server_port}", "--num-prompts", "2"
            assert "broken an answer off after 3 of 9 tokens" in cli(*command, "--output-len", "9").error()
        finally:
            stub.shutdown()
