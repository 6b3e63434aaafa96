"""What nobody should send: each gets its status, and the server goes on."""

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx2 as httpx
import pytest
from openai.types.responses import ResponseFailedEvent

from jaxinfer.server import answers, run
from jaxinfer.text import renderer
from tests.settled import settled

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "hi"}]

# What is wrong with a completion or a chat: field and value, and the param of the answer.
BAD = [
    (COMPLETIONS, {"n": 10**6}, "n"),
    (COMPLETIONS, {"n": 1000}, "n"),
    (COMPLETIONS, {"prompt": ["a"] * 129}, "prompt"),
    (COMPLETIONS, {"prompt": [[]]}, "prompt"),
    (COMPLETIONS, {"prompt": ""}, "prompt"),
    (COMPLETIONS, {"prompt": [10**9]}, "prompt"),
    (COMPLETIONS, {"prompt": [-1]}, "prompt"),
    (COMPLETIONS, {"prompt": "a " * 300}, "prompt"),
    (COMPLETIONS, {"prompt": "\ud800"}, "prompt"),
    (COMPLETIONS, {"max_tokens": 2**63}, "max_tokens"),
    (COMPLETIONS, {"temperature": "hot"}, "temperature"),
    (COMPLETIONS, {"stop": ""}, "stop"),
    (COMPLETIONS, {"stop": ["a"] * 65}, "stop"),
    (COMPLETIONS, {"logprobs": 21}, "logprobs"),
    (COMPLETIONS, {"logit_bias": {str(i): 1 for i in range(600)}}, "logit_bias"),
    (COMPLETIONS, {"best_of": 3}, "best_of"),
    (COMPLETIONS, {"suffix": "x"}, "suffix"),
    (COMPLETIONS, {"stream_options": {}}, "stream_options"),
    (COMPLETIONS, {"nonsense": 1}, "nonsense"),
    (COMPLETIONS, {"guided_regex": "("}, "structured_outputs"),
    (COMPLETIONS, {"cache_salt": ""}, "cache_salt"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": USER * 5000}, "messages"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
        "messages",
    ),
    (CHAT, {"response_format": {"type": "xml"}}, "response_format"),
    (
        CHAT,
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}},
        "response_format",
    ),
    (CHAT, {"top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens"),
    (CHAT, {"structured_outputs": {"json_object": True, "asked_as": "x"}}, "structured_outputs"),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "f", "parameters": 1}}]}, "tools"),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]}, "tools"),
    (CHAT, {"tools": [], "tool_choice": "required"}, "tool_choice"),
    (CHAT, {"tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
    (CHAT, {"chat_template": "{% for i in range(10**9) %}{% endfor %}"}, "chat_template"),
    (CHAT, {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    (CHAT, {"reasoning_effort": "low"}, "reasoning_effort"),
]


@pytest.mark.parametrize(("path", "changed", "param"), BAD, ids=lambda value: None if isinstance(value, str) else "")
def test_bad_requests_name_the_field(client, path, changed, param):
    body = {"model": "tiny", "messages": USER} if path == CHAT else {"model": "tiny", "prompt": "a", "max_tokens": 2}
    answer = client.post(path, content=json.dumps(body | changed), headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert "Traceback" not in answer.text


@pytest.mark.parametrize(
    ("path", "body", "problem"),
    [
        (
            "/v1/messages",
            {"messages": USER, "max_tokens": 2, "stop_sequences": [""]},
            "parameter stop_sequences is ['']",
        ),
        ("/v1/messages", {"messages": USER, "max_tokens": 0}, "parameter max_tokens is 0"),
        ("/v1/responses", {"input": "a", "max_output_tokens": 0}, "parameter max_output_tokens is 0"),
    ],
)
def test_bad_parameters_have_the_names_of_their_requests(client, path, body, problem):
    answer = client.post(path, json={"model": "tiny"} | body)
    assert answer.status_code == 400
    assert problem in answer.json()["error"]["message"]


BODIES = [
    (b"", 400),
    (b"{", 400),
    (b"[]", 400),
    (b"\xff", 400),
    (b'{"prompt": NaN}', 400),
    (b'{"prompt": 1e400}', 400),
    (b'{"max_tokens": ' + b"9" * 5000 + b"}", 400),
    (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, 400),
    (b'{"a":' * 80 + b"1" + b"}" * 80, 400),
    (b" " * 2**25, 413),
]


@pytest.mark.parametrize(("body", "status"), BODIES, ids=range(len(BODIES)))
def test_bodies(client, body, status):
    answer = client.post(COMPLETIONS, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def test_what_a_web_page_can_send_is_refused(client):
    body = json.dumps({"model": "tiny", "prompt": "a"})
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert client.post(COMPLETIONS, content=body, headers={"content-type": kind}).status_code == 415
    zipped = {"content-type": "application/json", "content-encoding": "gzip"}
    assert client.post(COMPLETIONS, content=body, headers=zipped).status_code == 415
    assert client.get("/v1/models", headers={"host": "evil.example"}).status_code == 403
    assert client.options(CHAT, headers={"origin": "http://evil.example"}).status_code == 405
    assert "access-control-allow-origin" not in client.get("/v1/models", headers={"origin": "http://x"}).headers


def test_paths_methods_and_ids(client):
    assert client.get("/nothing").status_code == 404
    assert client.get(CHAT).status_code == 405
    assert client.get("/v1/models/").status_code in (200, 404)
    assert client.get("/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert client.get("/health", headers={"x-request-id": "a b\t\\"}).headers["x-request-id"] != "a b\t\\"
    for path in ("/health", "/ready", "/ping", "/version", "/load"):
        assert client.get(path).status_code == 200


def test_headers_without_end_are_cut_off(server):
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ")
        with pytest.raises(OSError):  # noqa: PT012
            for _ in range(200):
                connection.sendall(b"x" * 2**16)
                time.sleep(0.01)


@pytest.mark.parametrize("before", [b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"])
def test_headers_that_are_too_long_are_answered(server, before):
    """Also while the client still sends them."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        if before:
            connection.sendall(before)
            assert connection.recv(2**16).startswith(b"HTTP/1.1 200 ")
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 2**22)
        answer = b"".join(iter(lambda: connection.recv(2**16), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431 Request Header Fields Too Large\r\n")
    assert str(run.HEADER_BYTES) in json.loads(body)["error"]["message"]


def test_keys(serve):
    server = serve(api_keys=("first-secret", "second-secret"))
    with httpx.Client(base_url=server.url) as client:
        for path in ("/health", "/ready", "/ping"):
            assert client.get(path).status_code == 200
        for path in ("/v1/models", "/metrics", "/load", "/version"):
            assert client.get(path).status_code == 401
        for given in ("first-secre", "first-secret2", "x", "ü"):
            headers = {"authorization": f"Bearer {given}".encode("latin-1")}
            assert client.get("/v1/models", headers=headers).status_code == 401
        for headers in ({"authorization": "Bearer first-secret"}, {"x-api-key": "second-secret"}):
            assert client.get("/v1/models", headers=headers | {"host": "my.example"}).status_code == 200


def test_one_key_does_not_see_what_another_has_asked(serve, served_llm):
    server = serve(api_keys=("first-secret", "second-secret"))
    body = {"prompt": "a secret of somebody " * 5, "max_tokens": 1}
    with httpx.Client(base_url=server.url, timeout=60) as client:

        def cached(key):
            answer = client.post(COMPLETIONS, json=body, headers={"authorization": f"Bearer {key}"})
            return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

        assert cached("first-secret") == 0
        assert cached("second-secret") == 0
        assert cached("first-secret") > 0


def test_who_leaves_takes_the_request_along(server, served_llm):
    body = {"model": "tiny", "prompt": "a", "max_tokens": 200, "ignore_eos": True}
    aborted = served_llm.stats.aborted
    for stream in (True, False):
        with httpx.Client(base_url=server.url, timeout=60) as client:
            if stream:
                with client.stream("POST", COMPLETIONS, json=body | {"stream": True, "n": 2}) as answer:
                    next(answer.iter_lines())
            else:
                with pytest.raises(httpx.TimeoutException):
                    client.post(COMPLETIONS, json=body | {"n": 8}, timeout=0.02)
        settled(served_llm)
    assert served_llm.stats.aborted > aborted


def test_parameters_that_leave_no_token_are_the_requests_fault(client, served_llm):
    (token,) = served_llm.tokenizer.encode("a", False)
    body = {"prompt": "b", "max_tokens": 9, "allowed_token_ids": [token], "no_repeat_ngram_size": 1}
    answer = client.post(COMPLETIONS, json=body)
    assert (answer.status_code, "exclude all of them" in answer.text) == (400, True)
    last = client.post(COMPLETIONS, json=body | {"stream": True}).text.strip().rpartition("data: ")[2]
    assert json.loads(last)["error"]["type"] == "invalid_request_error"
    body = {"input": "b", "stream": True} | {name: body[name] for name in ("allowed_token_ids", "no_repeat_ngram_size")}
    last = client.post("/v1/responses", json=body).text.strip().rpartition("data: ")[2]
    failed = ResponseFailedEvent.model_validate_json(last).response
    assert (failed.status, failed.error.code) == ("failed", "invalid_prompt")


def test_a_full_queue_says_429(serve, served_llm, slowly):
    server = serve(max_queued=1)
    body = {"prompt": "a", "max_tokens": 200, "ignore_eos": True, "stream": True}
    slowly(served_llm)
    with httpx.Client(base_url=server.url, timeout=60) as client, ExitStack() as streams:
        for running in range(1, 6):  # and one that waits
            assert streams.enter_context(client.stream("POST", COMPLETIONS, json=body)).status_code == 200
            deadline = time.monotonic() + 120  # programs may have to be compiled
            while (served_llm.stats.running, served_llm.stats.waiting) != (min(running, 4), max(running - 4, 0)):
                assert time.monotonic() < deadline
                time.sleep(0.01)
        refused = client.post(COMPLETIONS, json=body)
        assert refused.status_code == 429
        assert refused.headers["retry-after"]
        assert refused.json()["error"]["type"] == "rate_limit_error"
    settled(served_llm)


TEMPLATES = {
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "0.5 s of processor time",
    "{{ 7 ** 30000000 }}": "0.5 s of processor time",
    "{{ 'x' * 1500000000 }}": "MiB of memory",
}


def test_templates_that_take_too_much_keep_nobody_waiting(serve, served_llm, monkeypatch):
    """In worker processes: what Python would hold its lock for keeps the event loop from nothing."""
    monkeypatch.setattr(renderer, "SECONDS", 0.5)
    server = serve(trust_request_chat_template=True)
    chat = {"messages": USER, "max_tokens": 2}
    with httpx.Client(base_url=server.url, timeout=60) as client, ThreadPoolExecutor(3) as pool:
        plain = client.post(CHAT, json=chat).json()["usage"]  # its programs are there now
        attacks = [pool.submit(client.post, CHAT, json=chat | {"chat_template": source}) for source in TEMPLATES]
        served, longest = 0, 0.0
        while not all(attack.done() for attack in attacks):
            start = time.monotonic()
            assert client.post(CHAT, json=chat).json()["usage"]["prompt_tokens"] == plain["prompt_tokens"]
            served, longest = served + 1, max(longest, time.monotonic() - start)
        for attack, limit in zip(attacks, TEMPLATES.values(), strict=True):
            error = attack.result().json()["error"]
            assert (attack.result().status_code, error["param"]) == (400, "chat_template")
            assert limit in error["message"]
    assert served > 1
    assert longest < 10  # however busy the machine is


def test_tokens(client, served_llm):
    ids = served_llm.tokenizer.encode("hello")
    answer = client.post("/tokenize", json={"prompt": "hello", "return_token_strs": True}).json()
    assert (answer["tokens"], answer["count"]) == (ids, len(ids))
    assert len(answer["token_strs"]) == len(ids)
    chat = client.post("/tokenize", json={"messages": USER}).json()
    assert chat["tokens"] == served_llm.tokenizer.apply_chat_template(USER)
    assert client.post("/detokenize", json={"tokens": ids}).json()["prompt"] == served_llm.tokenizer.decode(ids, False)
    assert client.post("/detokenize", json={"tokens": ["a"]}).status_code == 400
    assert "at most" in client.post("/detokenize", json={"tokens": [5] * (2**18 + 1)}).json()["error"]["message"]


def test_a_text_that_can_not_fit_is_not_encoded(client, served_llm, monkeypatch):
    monkeypatch.setattr(served_llm.tokenizer, "encode", lambda *_, **__: pytest.fail("it was"))
    text = "a" * (2**20 + 1)
    for path, body in (
        (COMPLETIONS, {"prompt": text}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}),
        ("/tokenize", {"prompt": text}),
    ):
        error = client.post(path, json=body).json()["error"]
        assert (error["code"], "characters" in error["message"]) == ("context_length_exceeded", True)


def test_metrics_have_vllms_names(client):
    client.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 3, "ignore_eos": True})
    text = client.get("/metrics").text
    for name in (
        "vllm:num_requests_running",
        "vllm:generation_tokens_total",
        "vllm:time_to_first_token_seconds_bucket",
    ):
        assert f'{name}{{model_name="tiny"' in text
    assert 'handler="/v1/completions",method="POST",status="200"' in text


def test_a_body_that_breaks_off_is_nobodys_error(serve, caplog):
    server = serve()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f'{head}Content-Length: 99\r\n\r\n{{"prompt":'.encode())
    deadline = time.monotonic() + 60
    while not server._service.metrics.http[COMPLETIONS, "POST", 499]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_who_does_not_read_is_cut_off(serve, served_llm, monkeypatch):
    """What waits for a slow reader is bounded: the answer, of which the sockets take some."""
    monkeypatch.setattr(answers, "WRITE_SECONDS", 0.2)
    server = serve()
    server._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    cut_off = server._service.metrics.http[COMPLETIONS, "POST", 499]
    body = json.dumps({"prompt": "a", "max_tokens": 200, "ignore_eos": True, "stream": True, "n": 4, "logprobs": 20})
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    host, port = server.url.removeprefix("http://").split(":")
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((host, int(port)))
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        deadline = time.monotonic() + 120
        while server._service.metrics.http[COMPLETIONS, "POST", 499] == cut_off:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not server._service.active
    settled(served_llm)


def test_too_many_connections_are_refused_and_then_closed(serve, monkeypatch):
    monkeypatch.setattr(run, "SPARE_FILES", 4)
    server = serve(max_connections=2)
    host, port = server.url.removeprefix("http://").split(":")
    with httpx.Client(base_url=server.url, timeout=60) as client, ExitStack() as stack:
        assert client.get("/health").status_code == 200
        address = host, int(port)
        second, third, *_, last = (stack.enter_context(socket.create_connection(address, timeout=60)) for _ in range(6))
        assert last.recv(1) == b""
        for connection, status in ((second, b"200"), (third, b"503")):
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            head, _, body = b"".join(iter(lambda c=connection: c.recv(2**16), b"")).partition(b"\r\n\r\n")
            assert head.split()[1] == status
            if status == b"503":
                assert b"retry-after: 1" in head
                assert b"x-request-id" in head
                assert "too many connections" in json.loads(body)["error"]["message"]
        assert client.get("/health").status_code == 200  # it was there before


def test_what_is_no_http_is_told_so(serve):
    host, port = serve().url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(b"GET /health HTTP/9\x00\r\n\r\n")
        head, _, body = b"".join(iter(lambda: connection.recv(2**16), b"")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"] == {
        "message": "Invalid HTTP request received.", "type": "invalid_request_error", "param": None, "code": None
    }  # fmt: skip


@pytest.mark.parametrize(
    ("limit", "most", "raised", "room"), [(1024, 2**20, [1256], 1000), (512, 1024, [1024], 768), (9999, 9999, [], 1000)]
)
def test_connections_need_open_files(monkeypatch, limit, most, raised, room):
    given = []
    monkeypatch.setattr(run.resource, "getrlimit", lambda _: (limit, most))
    monkeypatch.setattr(run.resource, "setrlimit", lambda _, limits: given.append(limits))
    assert run.room_for(1000) == room
    assert given == [(soft, most) for soft in raised]
