"""A span of each request, for OpenTelemetry, with vLLM's names. Needs the extra `otel`.

Attributes: https://github.com/vllm-project/vllm (`SpanAttributes`). Who called: https://www.w3.org/TR/trace-context
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jaxinfer import __version__
from jaxinfer.engine.outputs import RequestOutput
from jaxinfer.sampling.params import SamplingParams

Attributes = dict[str, str | int | float]


class Tracing:
    """Sends spans to a collector, over HTTP, from a thread of its own; what can't be sent is dropped. They have nothing
    of what was asked or answered.

    endpoint: the collector's URL, http://localhost:4318/v1/traces say. Headers, certificates and limits come from the
    variables OTEL_*.
    """

    def __init__(self, endpoint: str):
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._trace, self._propagator = trace, TraceContextTextMapPropagator()
        name = os.environ.get("OTEL_SERVICE_NAME", "jaxinfer")
        self._provider = TracerProvider(resource=Resource.create({"service.name": name}), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
        self._tracer = self._provider.get_tracer("jaxinfer", __version__)

    @contextmanager
    def span(self, headers: Mapping[str, str], request_id: str) -> Iterator[None]:
        """While a request runs: `add` adds to its span."""
        caller = self._propagator.extract(headers)
        kind = self._trace.SpanKind.SERVER
        with self._tracer.start_as_current_span("llm_request", caller, kind, {"gen_ai.request.id": request_id}):
            yield

    def add(self, attributes: Attributes) -> None:
        """To the span of the request that this task is of."""
        self._trace.get_current_span().set_attributes(attributes)

    def answered(self, status: int) -> None:
        """With this HTTP status."""
        self.add({"http.response.status_code": status})
        if status >= 500:
            self._trace.get_current_span().set_status(self._trace.StatusCode.ERROR)

    def close(self) -> None:
        """Sends what is left."""
        self._provider.shutdown()


def generated(output: RequestOutput, params: SamplingParams, model: str, prompt: int, completion: int) -> Attributes:
    """Of a request that makes text. output: the last one. prompt, completion: tokens of all there is."""
    asked: dict[str, Any] = {
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.n": params.n,
    }
    return {name: value for name, value in asked.items() if value is not None} | {
        "gen_ai.response.model": model,
        "gen_ai.usage.prompt_tokens": prompt,
        "gen_ai.usage.completion_tokens": completion,
        "gen_ai.latency.time_to_first_token": output.metrics.time_to_first_token,
        "gen_ai.latency.e2e": output.metrics.total,
    }
