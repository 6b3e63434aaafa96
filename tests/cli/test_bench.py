"""`jaxinfer bench`."""

import json
import re

import pytest

SMALL = ["--max-num-seqs", "4", "--max-num-batched-tokens", "32"]  # few programs to compile
LENGTHS = ["--num-prompts", "6", "--input-len", "20", "--output-len", "10"]
STATISTICS = ("mean", "median", "p90", "p99")


def test_throughput(cli, model):
    code, out, err = cli("bench", "throughput", "-m", model, *SMALL, *LENGTHS, "--json")
    assert (code, err) == (0, "")
    figures = json.loads(out)
    assert figures["num_requests"] == 6
    assert figures["total_num_tokens"] == 6 * (20 + 10)
    assert figures["output_tokens_per_second"] == pytest.approx(60 / figures["elapsed_time"])


def test_only_what_is_measured_is_compiled(cli, model, monkeypatch):
    """And what is waited for is said, off a terminal too."""
    from jaxinfer.cli.console import Progress
    from jaxinfer.engine.runner import Runner

    said, say = [], Progress.__call__
    monkeypatch.setattr(Progress, "__call__", lambda self, what: said.append(what) or say(self, what))
    compiled, compile_one = [], Runner._compile
    monkeypatch.setattr(Runner, "_compile", lambda self, key: compiled.append(key) or compile_one(self, key))
    sizes = ["--max-num-seqs", 4, "--max-num-batched-tokens", 32]
    monkeypatch.setattr("tests.cli.run.PATIENCE", 0.01)
    code, out, err = cli("bench", "throughput", "-m", model, *sizes, *LENGTHS, "--json")
    assert (code, json.loads(out)["num_requests"]) == (0, 6)
    assert compiled == [("zeros", 1), ("forward", 32), ("sample", 4), ("decode", 4), ("decode", 2)]
    assert "compiled 4 of 4 programs" in said  # on a busy machine nobody may see it before the next
    assert set(re.findall("^jaxinfer: ", err, re.MULTILINE)) == {"jaxinfer: "}
    assert cli("bench", "throughput", "-m", model, *sizes, *LENGTHS, "--json", "-q").err == ""


def test_throughput_as_a_table(cli, model):
    code, out, err = cli("bench", "throughput", "-m", model, *SMALL, *LENGTHS)
    assert (code, err) == (0, "")
    rates = [
        float(re.search(rf"{name} *│ *([\d.]+)", out)[1]) for name in ("requests", "total tokens", "output tokens")
    ]
    assert rates[1] == pytest.approx(30 * rates[0], rel=0.05)
    assert rates[2] == pytest.approx(10 * rates[0], rel=0.05)


def test_latency_of_a_batch(cli, model):
    code, out, err = cli("bench", "latency", "-m", model, *SMALL, *LENGTHS, "--num-iters", 2, "--json")
    assert (code, err) == (0, "")
    figures = json.loads(out)
    assert figures["completed"] == 12
    assert len(figures["latencies"]) == 2
    assert figures["avg_latency"] == pytest.approx(sum(figures["latencies"]) / 2)
    assert set(figures["percentiles"]) == {"10", "25", "50", "75", "90", "99"}
    for name in ("ttft", "tpot", "itl", "e2el"):
        values = [figures[f"{statistic}_{name}_ms"] for statistic in STATISTICS]
        assert 0 < values[1] <= values[2] <= values[3]
    assert figures["mean_ttft_ms"] < figures["mean_e2el_ms"] <= 1000 * figures["avg_latency"]


def test_latency_under_a_request_rate(cli, model):
    arguments = [*SMALL, *LENGTHS, "--num-iters", 1, "--request-rate", 100]
    code, out, err = cli("bench", "latency", "-m", model, *arguments, "--json")
    assert (code, err) == (0, "")
    figures = json.loads(out)
    assert figures["completed"] == 6
    assert "avg_latency" not in figures
    assert figures["output_throughput"] == pytest.approx(60 / figures["duration"])
    table = cli("bench", "latency", "-m", model, *arguments).out
    assert all(name in table for name in (*STATISTICS, "TTFT", "TPOT", "ITL", "E2EL"))
    assert "until all are done" not in table


def test_one_token_has_no_time_per_token_after_it(cli, model):
    arguments = ["-m", model, *SMALL, "--num-prompts", 2, "--output-len", 1, "--num-iters", 1]
    table = cli("bench", "latency", *arguments).out
    assert "until all are done" in table
    assert "TTFT" in table
    assert "TPOT" not in table


def test_help(cli):
    code, out, err = cli("bench")
    assert (code, err) == (0, "")
    assert "throughput" in out
    assert "latency" in out


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["latency", "--request-rate", "0"], ["--request-rate is 0.0", "above 0"]),
        (["latency", "--request-rate", "nan"], ["--request-rate is nan", "finite"]),
        (["latency", "--num-prompts", "0"], ["--num-prompts", "jaxinfer bench latency --help"]),
        (["throughput", "--output-len", "0"], ["--output-len"]),
        (["throughput", "-m", "no/such/folder/here"], ["no/such/folder/here"]),
        (["speed"], ["'speed'", "jaxinfer bench --help"]),
    ],
)
def test_mistakes_are_one_line(cli, arguments, facts):
    line = cli("bench", *arguments).error()
    assert all(fact in line for fact in facts), line


def test_lengths_that_do_not_fit(cli, model):
    line = cli("bench", "throughput", "-m", model, *SMALL, "--input-len", 300).error()
    assert all(fact in line for fact in ("--input-len 300", "428 tokens", "max_model_len is 256"))


def test_batching_options_reach_the_engine(cli, model):
    line = cli("bench", "latency", "-m", model, "--max-num-seqs", 8, "--max-num-batched-tokens", 5).error()
    assert all(fact in line for fact in ("max_num_batched_tokens is 5", "max_num_seqs, 8")), line
