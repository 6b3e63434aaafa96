"""Spans of requests, as a collector gets them."""

import http.server
import threading
import time

import httpx2 as httpx
import pytest

from jaxinfer.server.config import ServerConfig

pytest.importorskip("opentelemetry.exporter.otlp.proto.http")

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
BODY = {"prompt": "a secret of mine", "max_tokens": 3, "ignore_eos": True, "temperature": 0.5}


@pytest.fixture
def collector():
    """Its URL, and what has come."""
    came = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            came.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", came
        server.shutdown()


def test_spans(serve, collector):
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    endpoint, came = collector
    server = serve(otlp_traces_endpoint=endpoint, drain_seconds=1)
    with httpx.Client(base_url=server.url, timeout=60) as client:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine-1"}
        assert client.post("/v1/completions", json=BODY | {"n": 2}, headers=headers).status_code == 200
        with client.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as answer:
            answer.read()
        assert client.post("/v1/completions", json={"n": "x"}).status_code == 400
        client.get("/health")
    server.close()
    spans = []
    for data in came:
        for resource in ExportTraceServiceRequest.FromString(data).resource_spans:
            assert any(entry.key == "service.name" for entry in resource.resource.attributes)
            spans += [span for scope in resource.scope_spans for span in scope.spans]
    assert [span.name for span in spans] == ["llm_request"] * 3
    attributes = [
        {entry.key: getattr(entry.value, entry.value.WhichOneof("value")) for entry in span.attributes}
        for span in spans
    ]
    first, streamed, refused = attributes
    assert (spans[0].trace_id.hex(), spans[0].parent_span_id.hex()) == (TRACE, PARENT)
    assert not spans[1].parent_span_id
    assert first["gen_ai.request.id"] == "mine-1"
    assert (first["gen_ai.usage.completion_tokens"], streamed["gen_ai.usage.completion_tokens"]) == (6, 3)
    assert first["gen_ai.usage.prompt_tokens"] == streamed["gen_ai.usage.prompt_tokens"] > 3
    assert first["gen_ai.response.model"] == "tiny"
    assert (first["gen_ai.request.temperature"], first["gen_ai.request.max_tokens"]) == (0.5, 3)
    assert 0 < first["gen_ai.latency.time_to_first_token"] < first["gen_ai.latency.e2e"]
    assert [entry["http.response.status_code"] for entry in attributes] == [200, 200, 400]
    assert "gen_ai.response.model" not in refused
    assert not any(b"secret" in data for data in came)


def test_endpoints():
    for wrong in ("localhost:4317", "grpc://localhost:4317"):
        with pytest.raises(ValueError, match="must be a URL"):
            ServerConfig(otlp_traces_endpoint=wrong)


@pytest.mark.slow
def test_nobody_waits_for_a_collector_that_is_not_there(serve):
    server = serve(otlp_traces_endpoint="http://127.0.0.1:9/v1/traces")
    with httpx.Client(base_url=server.url, timeout=60) as client:
        assert client.post("/v1/completions", json=BODY).status_code == 200
    start = time.monotonic()
    server.close()
    assert time.monotonic() - start < 20
