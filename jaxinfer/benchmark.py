"""Throughput and latency of a loaded model, under the names of `vllm bench`: for `jaxinfer bench` and benchmarks/.

TTFT  time to first token: from a request's arrival, so that waiting for a place in the batch counts
TPOT  time per output token: of those after the first
ITL   inter-token latency: between one piece of a request's output and the next, as a reader of the stream gets them
E2EL  end-to-end latency: from arrival to the last token
"""

from __future__ import annotations

import itertools
import queue
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from jaxinfer.engine.batch_builder import BatchBuilder
from jaxinfer.engine.buckets import Buckets
from jaxinfer.engine.engine import Engine
from jaxinfer.engine.load import make_scheduler
from jaxinfer.engine.programs import Decode, Forward, FullDecode, FullSample, Key, Sample, adapted_kind
from jaxinfer.engine.runner import Result, Runner
from jaxinfer.engine.scheduler import SchedulerOutput
from jaxinfer.engine.thread import AnyGroup, Submission
from jaxinfer.llm import LLM
from jaxinfer.sampling.params import SamplingParams

PERCENTILES = (10, 25, 50, 75, 90, 99)


class Work(NamedTuple):
    """A request.

    prompt: its token ids.
    output_len: how many tokens it is continued by, whatever they are.
    adapter: the name of one that is loaded.
    """

    prompt: list[int]
    output_len: int
    adapter: str | None = None

    @property
    def params(self) -> SamplingParams:
        """Greedy, as text, to the end."""
        return SamplingParams(temperature=0.0, max_tokens=self.output_len, ignore_eos=True)


@dataclass
class Trace:
    """One request under `serve`, times as of time.perf_counter.

    arrival: when it arrived.
    times, tokens: when output came, and how many tokens each time.
    """

    arrival: float
    times: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.arrival

    @property
    def e2el(self) -> float:
        """Seconds to the last token."""
        return self.times[-1] - self.arrival

    @property
    def tpot(self) -> list[float]:
        """Seconds per token after the first; none if there are no such tokens."""
        count = sum(self.tokens) - 1
        return [(self.times[-1] - self.times[0]) / count] if count else []

    @property
    def itl(self) -> list[float]:
        """Seconds between pieces."""
        return np.diff(self.times).tolist()


def random_work(
    vocab_size: int,
    input_lens: Sequence[int],
    output_lens: Sequence[int],
    seed: int | Sequence[int] = 0,
    prefix_len: int = 0,
) -> list[Work]:
    """Prompts of random tokens. The first `prefix_len` tokens are the same in all and not part of their lengths."""
    rng = np.random.default_rng(seed)
    prefix = rng.integers(0, vocab_size, prefix_len).tolist()
    return [
        Work(prefix + rng.integers(0, vocab_size, input_len).tolist(), output_len)
        for input_len, output_len in zip(input_lens, output_lens, strict=True)
    ]


def in_turns(work: Sequence[Work], adapters: Sequence[str]) -> list[Work]:
    """With these adapters, one after the other."""
    names = itertools.cycle(adapters or [None])
    return [request._replace(adapter=name) for request, name in zip(work, names, strict=False)]


def poisson_arrivals(count: int, request_rate: float, seed: int | Sequence[int] = 0) -> list[float]:
    """Seconds at which requests come that come independently of each other, `request_rate` a second on average."""
    return np.random.default_rng(seed).exponential(1 / request_rate, count).cumsum().tolist()


def check_lengths(llm: LLM, input_len: int, output_len: int) -> None:
    """Raises ValueError if sequences of these lengths would be cut short."""
    limit = llm.sizes.max_model_len
    if input_len + output_len > limit:
        raise ValueError(
            f"--input-len {input_len} and --output-len {output_len} are {input_len + output_len} tokens: "
            f"max_model_len is {limit}; ask for fewer or raise --max-model-len"
        )


class _Rehearsal:
    """In place of a Runner: every call is done at once, of token 0, and what is kept is which programs it needs."""

    def __init__(self, runner: Runner):
        self.model, self.max_steps, self.compile_seconds = runner.model, runner.max_steps, 0.0
        self.programs: dict[Key, None] = {}
        self._batches = BatchBuilder(runner.programs)

    def load_adapter(self, slot: int, adapter: Any) -> None:
        """Is done, too."""

    def launch(self, schedules: Sequence[SchedulerOutput]) -> Any:
        self.programs |= dict.fromkeys(key for key, _ in self._batches.build(schedules).calls)
        steps = max(schedule.steps for schedule in schedules)
        count = np.zeros((len(schedules), max(len(schedule.requests) for schedule in schedules)), np.int32)
        for row, schedule in zip(count, schedules, strict=True):
            row[: len(schedule.samples)] = np.minimum(schedule.samples, steps)
        result = Result(np.zeros((steps, count.size), np.int32), count.reshape(-1), None, None, {})
        return SimpleNamespace(wait=lambda: result, held=None)


def programs_together(llm: LLM, work: Sequence[Work]) -> list[Key]:
    """The programs that `generate` calls for all of it: when nothing ends early, lengths alone decide that."""
    runner, there = llm.engine.runner, llm.engine
    rehearsal: Any = _Rehearsal(runner)
    engine = Engine(
        rehearsal,
        make_scheduler(runner.programs),
        there.tokenizer,
        eos_token_ids=there.eos_token_ids,
        max_model_len=there.max_model_len,
        seed=0,
    )
    engine.adapters = there.adapters
    for request in work:
        params = replace(request.params, detokenize=False)
        engine.queue(engine.new_group(request.prompt, params, adapter=request.adapter))
    while not engine.idle:
        engine.step()
    return list(rehearsal.programs)


def programs_in_any_order(llm: LLM, work: Sequence[Work]) -> list[Key]:
    """Those that may be called for it, whenever each of it arrives, as long as there is room in the cache."""
    runner = llm.engine.runner
    buckets, most = runner.buckets, min(len(work), runner.max_rows)
    tokens = min(sum(len(request.prompt) for request in work), buckets.tokens[-1])
    largest = {Forward.kind: Buckets.fit(buckets.tokens, tokens)}
    if any(request.params.is_plain for request in work):
        largest |= {Decode.kind: Buckets.fit(buckets.decode, most), Sample.kind: Buckets.fit(buckets.sample, most)}
    if not all(request.params.is_plain for request in work):
        largest[FullDecode.kind] = Buckets.fit(buckets.full_decode, most)
        largest[FullSample.kind] = Buckets.fit(buckets.sample, most)
    if any(request.adapter for request in work):
        largest |= {adapted_kind(kind): size for kind, size in largest.items()}
    return [(kind, size) for kind, size in runner.programs.keys() if size <= largest.get(kind, 0)]  # noqa: SIM118


def generate(llm: LLM, work: Sequence[Work]) -> tuple[float, list[list[int]]]:
    """Seconds of one `LLM.generate` on all of it, and the sampled ids."""
    prompts = [{"prompt_token_ids": request.prompt, "adapter": request.adapter} for request in work]
    start = time.perf_counter()
    outputs = llm.generate(prompts, [request.params for request in work], use_tqdm=False)
    return time.perf_counter() - start, [output.outputs[0].token_ids for output in outputs]


def throughput(llm: LLM, work: Sequence[Work]) -> dict[str, float]:
    """What `vllm bench throughput` reports of one `LLM.generate` on all of it. Programs have to be compiled before."""
    seconds, sampled = generate(llm, work)
    output = sum(map(len, sampled))
    total = output + sum(len(request.prompt) for request in work)
    return {
        "elapsed_time": seconds,
        "num_requests": len(work),
        "total_num_tokens": total,
        "requests_per_second": len(work) / seconds,
        "tokens_per_second": total / seconds,
        "output_tokens_per_second": output / seconds,
    }


def serve(llm: LLM, work: Sequence[Work], arrivals: Sequence[float]) -> list[Trace]:
    """Serves requests that arrive at the given seconds, in order, as `AsyncEngine` would: in one batch, each output in
    pieces as it comes. Nobody waits for an answer before the next request arrives."""
    start = time.perf_counter()
    traces = [Trace(start + arrival) for arrival in arrivals]
    coming = deque(zip(traces, work, strict=True))
    ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    groups: list[AnyGroup] = []

    def listener(trace: Trace, group: AnyGroup, error: BaseException | None) -> None:
        if error is None:
            trace.times.append(time.perf_counter())
            trace.tokens.append(len(group.members[0].request.output_token_ids) - sum(trace.tokens))
        if error is not None or group.finished:
            ended.put(error)

    try:
        while coming:
            time.sleep(max(0.0, coming[0][0].arrival - time.perf_counter()))
            arrived = []
            while coming and coming[0][0].arrival <= time.perf_counter():
                trace, request = coming.popleft()
                groups.append(llm.engine.new_group(request.prompt, request.params, adapter=request.adapter))
                arrived.append(Submission(groups[-1], partial(listener, trace), streams=True))
            llm.engine_thread.submit(arrived)
        for _ in groups:
            if (error := ended.get()) is not None:
                raise error
    finally:
        for group in groups:
            llm.engine_thread.abort(group)
    return traces


def latency(runs: Sequence[Sequence[Trace]]) -> dict[str, float]:
    """What `vllm bench serve` reports of requests that were served, in one run or several: rates a second, and
    statistics of TTFT, TPOT, ITL and E2EL in milliseconds. One that has no values is left out."""
    traces = [trace for run in runs for trace in run]
    seconds = sum(map(_duration, runs))
    figures = {
        "completed": len(traces),
        "duration": seconds,
        "request_throughput": len(traces) / seconds,
        "output_throughput": sum(sum(trace.tokens) for trace in traces) / seconds,
    }
    measured: dict[str, list[float]] = {
        "ttft": [trace.ttft for trace in traces],
        "tpot": [x for trace in traces for x in trace.tpot],
        "itl": [x for trace in traces for x in trace.itl],
        "e2el": [trace.e2el for trace in traces],
    }
    for name, values in measured.items():
        if values:
            figures[f"mean_{name}_ms"] = 1000 * float(np.mean(values))
            for statistic, percentile in (("median", 50), ("p90", 90), ("p99", 99)):
                figures[f"{statistic}_{name}_ms"] = 1000 * float(np.percentile(values, percentile))
    return figures


def batch_latency(runs: Sequence[Sequence[Trace]]) -> dict[str, Any]:
    """What `vllm bench latency` reports of requests that came together, in seconds: how long until all were done."""
    seconds = [_duration(run) for run in runs]
    return {
        "avg_latency": float(np.mean(seconds)),
        "latencies": seconds,
        "percentiles": {str(p): float(np.percentile(seconds, p)) for p in PERCENTILES},
    }


def _duration(run: Sequence[Trace]) -> float:
    return max(trace.times[-1] for trace in run) - min(trace.arrival for trace in run)
