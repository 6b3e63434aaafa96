"""Many requests at once on CPU: jaxinfer beside transformers, and what the engine's parts gain.

    python benchmarks/throughput.py [--requests N] [--runs N] [--scale X] [--parts PART ...] [--json FILE]

A 0.35B Llama with random weights in float32; each system in a process of its own, asked in turn; medians. Parts:

    peers    prompts of 16 to 512 tokens, outputs of 16 to 256: against transformers' continuous batching (what its
             `generate_batch` runs) and its padded `generate`. Only the tokens that were asked for count.
    prefix   prompts with 512 tokens in common, prefix caching on and off
    chunks   tokens of running requests while a long prompt comes in: in chunks of 512, and at once
    latency  Poisson arrivals at several rates: TTFT, TPOT and ITL as `vllm bench serve` has them

The whole takes over an hour on two cores; `--requests 8 --runs 1 --scale 0.1 --rates 1` a minute or two.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from peers import Peer
from random_model import LLAMA_350M, write_model
from rich.console import Console
from rich.table import Table

from jaxinfer.benchmark import Trace, Work, latency, poisson_arrivals, random_work

VOCAB = int(str(LLAMA_350M["vocab_size"]))
SHORTEST, PROMPT, OUTPUT = 16, 512, 256  # tokens
LONG_PROMPT, CHUNK, RUNNING = 1536, 512, 8  # tokens, tokens, requests
PARTS = ("peers", "prefix", "chunks", "latency")


def mixed_work(count: int, scale: float, seed: int) -> list[Work]:
    """The lengths that the benchmark is about; `scale` shortens the longest ones."""
    rng = np.random.default_rng(seed)
    inputs, outputs = (
        rng.integers(SHORTEST, max(SHORTEST, round(longest * scale)) + 1, count).tolist()
        for longest in (PROMPT, OUTPUT)
    )
    return random_work(VOCAB, inputs, outputs, [seed, 1])


def serve(peer: Peer, work: list[Work], arrivals: list[float]) -> list[Trace]:
    """What came when."""
    return [Trace(**trace) for trace in peer.ask(work=work, arrivals=arrivals)["traces"]]


class Bench:
    """The measurements; each returns rows of figures by name."""

    def __init__(self, folder: Path, requests: int, runs: int, scale: float, rates: list[float]):
        self.folder, self.requests, self.runs, self.scale, self.rates = folder, requests, runs, scale, rates

    def jaxinfer(self, **options: Any) -> Peer:
        return Peer("throughput_jaxinfer.py", str(self.folder), json.dumps(options))

    def peers(self) -> dict[str, dict[str, float]]:
        ours = self.jaxinfer()
        theirs = Peer("throughput_transformers.py", str(self.folder), str(len(os.sched_getaffinity(0))))
        ask = {
            "jaxinfer": lambda work: ours.ask(work=work),
            "transformers, continuous batching": lambda work: theirs.ask(how="continuous", work=work),
            "transformers, padded": lambda work: theirs.ask(how="padded", work=work),
        }
        rates: dict[str, list[float]] = {name: [] for name in ask}
        same: dict[str, list[bool]] = {name: [] for name in ask}
        for run in range(-1, self.runs):
            # The first is a warm-up; then other prompts each time, or the prefix cache would know them.
            work = mixed_work(self.requests, self.scale, run) if run >= 0 else mixed_work(2, 0, 0)
            answers = {name: call(work) for name, call in ask.items()}
            for name, answer in answers.items():
                if run >= 0:
                    assert [len(tokens) for tokens in answer["tokens"]] == [request.output_len for request in work]
                    rates[name].append(sum(request.output_len for request in work) / answer["seconds"])
                    same[name] += [a == b for a, b in zip(answer["tokens"], answers["jaxinfer"]["tokens"], strict=True)]
                    print(f"run {run}: {name}: {rates[name][-1]:.2f} output tokens/s", file=sys.stderr, flush=True)
        ours.close()
        theirs.close()
        best = statistics.median(rates["jaxinfer"])
        return {
            name: {
                "output tokens/s": statistics.median(values),
                "jaxinfer is faster by": best / statistics.median(values),
                "% same outputs": 100 * float(np.mean(same[name])),
            }
            for name, values in rates.items()
        }

    def prefix(self) -> dict[str, dict[str, float]]:
        names = {"prefix caching on": True, "prefix caching off": False}
        peers = {name: self.jaxinfer(enable_prefix_caching=on) for name, on in names.items()}
        seconds: dict[str, list[float]] = {name: [] for name in peers}
        prefilled: dict[str, list[int]] = {name: [] for name in peers}
        count = max(8, self.requests // 4)
        for run in range(self.runs):
            work = random_work(VOCAB, [SHORTEST] * count, [SHORTEST] * count, [run, 2], round(PROMPT * self.scale))
            for name, peer in peers.items():
                answer = peer.ask(work=work)
                seconds[name].append(answer["seconds"])
                prefilled[name].append(sum(len(request.prompt) for request in work) - answer["hit_tokens"])
        off = list(peers)[-1]
        for peer in peers.values():
            peer.close()
        return {
            name: {
                "requests/s": count / statistics.median(seconds[name]),
                "faster by": statistics.median(seconds[off]) / statistics.median(seconds[name]),
                "prefilled tokens": statistics.median(prefilled[name]),
                "fewer by": statistics.median(prefilled[off]) / statistics.median(prefilled[name]),
            }
            for name in peers
        }

    def chunks(self) -> dict[str, dict[str, float]]:
        """ITL of the running requests between the arrival of the long prompt and its first token."""
        long, chunk = (round(tokens * self.scale) for tokens in (LONG_PROMPT, CHUNK))
        options = {f"chunks of {chunk}": chunk, f"{long} tokens at once": long + RUNNING}
        peers = {
            name: self.jaxinfer(max_num_seqs=16, max_num_batched_tokens=tokens) for name, tokens in options.items()
        }
        waits: dict[str, list[float]] = {name: [] for name in peers}
        first: dict[str, list[float]] = {name: [] for name in peers}
        for run in range(self.runs):
            work = random_work(VOCAB, [SHORTEST] * RUNNING + [long], [OUTPUT] * RUNNING + [1], [run, 3])
            alone = random_work(VOCAB, [SHORTEST] * RUNNING, [OUTPUT] * RUNNING, [run, 4])
            for name, peer in peers.items():
                half = max(trace.e2el for trace in serve(peer, alone, [0.0] * RUNNING)) / 2
                *running, last = serve(peer, work, [0.0] * RUNNING + [half])
                first[name].append(last.ttft)
                waits[name] += [
                    after - before
                    for trace in running
                    for before, after in itertools.pairwise(trace.times)
                    if after > last.arrival and before < last.times[0]
                ]
        for peer in peers.values():
            peer.close()
        return {
            name: {
                "mean ITL ms": 1000 * statistics.fmean(waits[name]),
                "p99 ITL ms": 1000 * float(np.percentile(waits[name], 99)),
                "longest ITL ms": 1000 * max(waits[name]),
                "TTFT of the prompt ms": 1000 * statistics.median(first[name]),
            }
            for name in peers
        }

    def latency(self) -> dict[str, dict[str, float]]:
        peer = self.jaxinfer()
        count = max(2, self.requests // 4)
        peer.ask(work=mixed_work(2, 0, 0))
        figures = {}
        for i, rate in enumerate(self.rates):
            work = mixed_work(count, self.scale, 1000 + i)
            traces = serve(peer, work, poisson_arrivals(count, rate, 1000 + i))
            figures[f"{rate:g} requests/s"] = latency([traces])
        peer.close()
        return figures


def print_table(console: Console, title: str, figures: dict[str, dict[str, float]]) -> None:
    columns = list(dict.fromkeys(column for row in figures.values() for column in row))
    cells = {(name, column): f"{value:.2f}" for name, row in figures.items() for column, value in row.items()}
    heads, lines = columns, list(figures)
    if len(columns) > 6:  # too wide: the other way round
        heads, lines = lines, columns
        cells = {(column, name): text for (name, column), text in cells.items()}
    table = Table("", title=title, title_justify="left")
    for head in heads:
        table.add_column(head, justify="right")
    for line in lines:
        table.add_row(line, *(cells[line, head] for head in heads))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "jaxinfer-llama-350m")
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="shortens prompts and outputs")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 0.2, 0.4], help="requests a second")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folder = write_model(arguments.folder)
    bench = Bench(folder, arguments.requests, arguments.runs, arguments.scale, arguments.rates)
    console = Console(width=120)
    results = {}
    for part in arguments.parts:
        results[part] = getattr(bench, part)()
        print_table(console, part, results[part])
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
