"""What the benchmarks compute from what they measured."""

import numpy as np
import pytest

from jaxinfer import LLM
from jaxinfer.benchmark import (
    Trace,
    batch_latency,
    generate,
    latency,
    poisson_arrivals,
    programs_in_any_order,
    programs_together,
    random_work,
    serve,
    throughput,
)
from tests.settled import settled


@pytest.fixture(scope="module")
def llm(checkpoints):
    with LLM(checkpoints("llama").folder, max_num_seqs=4, max_num_batched_tokens=32) as llm:
        yield llm


def test_latencies_of_known_times():
    """Two requests: three tokens in two pieces, and a single one."""
    runs = [[Trace(10.0, [10.5, 11.5], [1, 2])], [Trace(20.0, [20.25], [1])]]
    figures = latency(runs)
    assert figures["completed"] == 2
    assert figures["duration"] == pytest.approx(1.75)
    assert figures["request_throughput"] == pytest.approx(2 / 1.75)
    assert figures["output_throughput"] == pytest.approx(4 / 1.75)
    assert figures["mean_ttft_ms"] == pytest.approx(375)
    assert figures["p99_ttft_ms"] == pytest.approx(497.5)
    assert figures["mean_tpot_ms"] == pytest.approx(500)
    assert figures["median_itl_ms"] == pytest.approx(1000)
    assert figures["median_e2el_ms"] == pytest.approx(875)
    assert not any("tpot" in name or "itl" in name for name in latency(runs[1:]))
    batch = batch_latency(runs)
    assert batch["latencies"] == [1.5, 0.25]
    assert batch["avg_latency"] == pytest.approx(0.875)
    assert batch["percentiles"]["90"] == pytest.approx(1.375)


def test_random_work():
    work = random_work(50, [3, 70], [5, 6], seed=1, prefix_len=4)
    assert [(len(request.prompt), request.output_len) for request in work] == [(7, 5), (74, 6)]
    assert work[0].prompt[:4] == work[1].prompt[:4]
    assert {token for request in work for token in request.prompt} <= set(range(50))
    assert work == random_work(50, [3, 70], [5, 6], seed=1, prefix_len=4)
    assert work != random_work(50, [3, 70], [5, 6], seed=2, prefix_len=4)


def test_poisson_arrivals():
    arrivals = np.array(poisson_arrivals(4000, 8.0, seed=0))
    gaps = np.diff(arrivals, prepend=0.0)
    assert (gaps > 0).all()
    # Exponential gaps: mean and standard deviation are both 1 / rate.
    assert gaps.mean() == pytest.approx(1 / 8, rel=0.1)
    assert gaps.std() == pytest.approx(1 / 8, rel=0.1)


def test_served_requests_get_what_generate_gives(llm):
    work = random_work(300, [5, 40, 9, 7, 20, 3], [20, 1, 33, 8, 50, 12], seed=3)
    _, tokens = generate(llm, work)
    assert [len(ids) for ids in tokens] == [request.output_len for request in work]
    arrivals = [0.0, 0.01, 0.02, 0.02, 0.2, 0.2]
    traces = serve(llm, work, arrivals)
    start = traces[0].arrival
    assert [trace.arrival - start for trace in traces] == pytest.approx(arrivals)
    for trace, request in zip(traces, work, strict=True):
        assert sum(trace.tokens) == request.output_len
        assert min(trace.tokens) >= 1
        assert trace.arrival < trace.times[0]
        assert trace.times == sorted(trace.times)
    settled(llm)


def test_a_refused_request_leaves_nothing(llm):
    work = random_work(300, [5, 500], [20, 1], seed=4)
    with pytest.raises(ValueError, match="500 tokens"):
        serve(llm, work, [0.0, 0.0])
    settled(llm)


def test_throughput(llm):
    work = random_work(300, [5, 40], [20, 3], seed=5)
    figures = throughput(llm, work)
    seconds = figures["elapsed_time"]
    assert figures["num_requests"] == 2
    assert figures["total_num_tokens"] == 45 + 23
    assert figures["requests_per_second"] == pytest.approx(2 / seconds)
    assert figures["tokens_per_second"] == pytest.approx(68 / seconds)
    assert figures["output_tokens_per_second"] == pytest.approx(23 / seconds)


@pytest.mark.parametrize(("input_lens", "output_lens"), [([5, 40], [20, 3]), ([9] * 11, [7] * 11), ([3], [1])])
def test_the_programs_of_a_measurement(llm, monkeypatch, input_lens, output_lens):
    """Those that are called are known before, and no others are compiled for it."""
    work = random_work(300, input_lens, output_lens, seed=6)
    together, any_order = programs_together(llm, work), programs_in_any_order(llm, work)
    called = []
    ready = llm.engine.runner._ready
    monkeypatch.setattr(llm.engine.runner, "_ready", lambda keys, then: called.extend(keys) or ready(keys, then))
    generate(llm, work)
    assert set(called) == set(together)
    called.clear()
    serve(llm, random_work(300, input_lens, output_lens, seed=7), [0.01 * i for i in range(len(work))])
    assert set(called) <= set(any_order) <= set(llm.engine.runner.programs.keys())
