"""jaxinfer beside transformers on the same weights: prefill and decode tokens/s on CPU, and peak memory.

    python benchmarks/vs_transformers.py [--model MODEL] [--folder DIR] [--dtypes float32] [--json FILE]

Builds a model with random weights, a 0.35B Llama, a 1B Qwen3-MoE, a 0.34B Qwen3.5 or a 0.31B Mamba, starts each system
in a process of its own and asks them in turn. Prompt 128, 64 new tokens, medians of interleaved runs. Decode is (time
of 64 new tokens) - (time of 1), so prefill is not in it. With `--dtypes` alone jaxinfer is by itself, as for what a
token of a long prompt takes: `--model qwen3.5 --batches 1 --new 2 --dtypes --prompt 512`, and the same with 4096.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from peers import Peer, cpu_name
from random_model import MODELS, write_model
from rich.console import Console
from rich.table import Table


def measure(peers: dict[str, Peer], batch: int, runs: int, prompt: int, new: int, vocab: int) -> dict[str, Any]:
    """Median tokens/s of prefill and decode of each peer, and each peer's tokens in the last run."""
    seconds: dict[str, dict[int, list[float]]] = {name: {1: [], new: []} for name in peers}
    tokens: dict[str, Any] = {}
    for run in range(-1, runs):  # the first is a warm-up
        prompts = np.random.default_rng(run + 1).integers(3, vocab, (batch, prompt)).tolist()
        for name, peer in peers.items():
            for count in (1, new):
                answer = peer.ask(prompts=prompts, new_tokens=count)
                tokens[name] = answer["tokens"]
                if run >= 0:
                    seconds[name][count].append(answer["seconds"])
    result: dict[str, Any] = {}
    for name, by_count in seconds.items():
        decode = [whole - first for first, whole in zip(by_count[1], by_count[new], strict=True)]
        result[name] = {
            "prefill": batch * prompt / statistics.median(by_count[1]),
            "decode": batch * (new - 1) / statistics.median(decode),
            "prefill_runs": [batch * prompt / s for s in by_count[1]],
            "decode_runs": [batch * (new - 1) / s for s in decode],
        }
    first = next(iter(tokens.values()))
    for name in peers:
        same = np.mean([a == b for x, y in zip(first, tokens[name], strict=True) for a, b in zip(x, y, strict=True)])
        result[name]["same_tokens"] = float(same)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama")
    parser.add_argument("--folder", type=Path, help="of the model, which is made if it is not there")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"], help="of transformers, if any")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    name, config = MODELS[arguments.model]
    folder = str(write_model(arguments.folder or Path(tempfile.gettempdir()) / name, config))
    threads = str(len(os.sched_getaffinity(0)))
    peers = {"jaxinfer float32": Peer("worker_jaxinfer.py", folder, "float32")}
    for dtype in arguments.dtypes:
        peers[f"transformers {dtype}"] = Peer("worker_transformers.py", folder, dtype, threads)
    vocab = int(str(config["vocab_size"]))
    results = {
        batch: measure(peers, batch, arguments.runs, arguments.prompt, arguments.new, vocab)
        for batch in arguments.batches
    }
    peaks = {name: peer.ask(prompts=[[5]], new_tokens=1)["peak"] for name, peer in peers.items()}
    for peer in peers.values():
        peer.close()

    console = Console(width=120)
    table = Table("batch", "system", "prefill tok/s", "jaxinfer /", "decode tok/s", "jaxinfer /", "same tokens")
    for batch, result in results.items():
        ours = result["jaxinfer float32"]
        for name, row in result.items():
            ratios = [f"{ours[phase] / row[phase]:.2f}" for phase in ("prefill", "decode")]
            table.add_row(
                str(batch),
                name,
                f"{row['prefill']:.0f}",
                ratios[0],
                f"{row['decode']:.1f}",
                ratios[1],
                f"{row['same_tokens']:.1%}",
            )
    console.print(table)
    memory = Table(
        "system", "weights MB", "KV pool MB", "peak resident MB", "peak without pool / (1.25 weights + 700 MB)"
    )
    for name, peer in peers.items():
        weights, pool, peak = (n / 1e6 for n in (peer.ready["weights"], peer.ready["cache"], peaks[name]))
        memory.add_row(
            name, f"{weights:.0f}", f"{pool:.0f}", f"{peak:.0f}", f"{(peak - pool) / (1.25 * weights + 700):.2f}"
        )
    console.print(memory)
    if arguments.json is not None:
        ready = {name: peer.ready | {"peak": peaks[name]} for name, peer in peers.items()}
        report = {"cpu": cpu_name(), "results": results, "memory": ready}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
