"""Counts and times in Prometheus' text format, under vLLM's names, which autoscalers and dashboards know.

Format: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

import bisect
import time
from collections import Counter
from collections.abc import Iterator, Sequence

from jaxinfer.engine.outputs import RequestOutput
from jaxinfer.engine.stats import EngineStats

SECONDS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
    160.0,
)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class Histogram:
    """Values in buckets."""

    def __init__(self, bounds: Sequence[float]):
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def lines(self, name: str, labels: str) -> Iterator[str]:
        yield f"# TYPE {name} histogram"
        total = 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{{labels},le="{bound}"}} {total}'
        yield f"{name}_sum{{{labels}}} {self._sum}"
        yield f"{name}_count{{{labels}}} {total}"


class Metrics:
    """What a server counts. All in the event loop."""

    def __init__(self) -> None:
        self.ended: Counter[str] = Counter()
        self.http: Counter[tuple[str, str, int]] = Counter()
        self.prompt_tokens = self.generation_tokens = 0
        self.first = Histogram(SECONDS)
        self.between = Histogram(SECONDS)
        self.whole = Histogram(SECONDS)
        self.prompts, self.generations = Histogram(TOKENS), Histogram(TOKENS)

    def end(self, output: RequestOutput, prompt_tokens: int, generated: int, reasons: Sequence[str]) -> None:
        """Of one prompt. output: its last."""
        self.ended.update(reasons)
        self.prompt_tokens += prompt_tokens
        self.generation_tokens += generated
        self.prompts.observe(prompt_tokens)
        self.generations.observe(generated)
        self.first.observe(output.metrics.time_to_first_token)
        self.whole.observe(output.metrics.total)

    def pooled(self, prompt_tokens: int, seconds: float) -> None:
        """Of one text."""
        self.ended["stop"] += 1
        self.prompt_tokens += prompt_tokens
        self.prompts.observe(prompt_tokens)
        self.whole.observe(seconds)

    def text(self, model: str, stats: EngineStats) -> str:
        """All of it."""
        labels = f'model_name="{_escaped(model)}",engine="0"'
        lines: list[str] = []

        def single(kind: str, name: str, value: float) -> None:
            lines.extend((f"# TYPE vllm:{name} {kind}", f"vllm:{name}{{{labels}}} {value}"))

        single("gauge", "num_requests_running", stats.running)
        single("gauge", "num_requests_waiting", stats.waiting)
        single("gauge", "kv_cache_usage_perc", stats.pages_used / stats.pages_total if stats.pages_total else 0.0)
        single("counter", "prompt_tokens_total", self.prompt_tokens)
        single("counter", "generation_tokens_total", self.generation_tokens)
        single("counter", "num_preemptions_total", stats.preemptions)
        single("counter", "prefix_cache_queries_total", stats.queried_tokens)
        single("counter", "prefix_cache_hits_total", stats.hit_tokens)
        lines.append("# TYPE vllm:request_success_total counter")
        for reason in ("stop", "length", "abort", "error"):
            lines.append(f'vllm:request_success_total{{{labels},finished_reason="{reason}"}} {self.ended[reason]}')
        if stats.max_adapters:
            running, waiting = (_escaped(",".join(by)) for by in (stats.running_adapters, stats.waiting_adapters))
            adapters = f'running_lora_adapters="{running}",waiting_lora_adapters="{waiting}"'
            which = f'{labels},{adapters},max_lora="{stats.max_adapters}"'
            lines += ["# TYPE vllm:lora_requests_info gauge", f"vllm:lora_requests_info{{{which}}} {time.time()}"]
            lines.append("# TYPE jaxinfer:adapter_generation_tokens_total counter")
            for name, tokens in stats.adapter_tokens.items():
                adapter = f'adapter="{_escaped(name)}"'
                lines.append(f"jaxinfer:adapter_generation_tokens_total{{{labels},{adapter}}} {tokens}")
        for name, histogram in (
            ("time_to_first_token_seconds", self.first),
            ("inter_token_latency_seconds", self.between),
            ("e2e_request_latency_seconds", self.whole),
            ("request_prompt_tokens", self.prompts),
            ("request_generation_tokens", self.generations),
        ):
            lines.extend(histogram.lines(f"vllm:{name}", labels))
        lines.append("# TYPE http_requests_total counter")
        for (handler, method, status), count in self.http.items():
            lines.append(f'http_requests_total{{handler="{handler}",method="{method}",status="{status}"}} {count}')
        return "\n".join(lines) + "\n"


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
