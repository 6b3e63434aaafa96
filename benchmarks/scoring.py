"""Scoring given texts on CPU: jaxinfer as lm-eval's model beside lm-eval's own `hf` model, on the same items.

    python benchmarks/scoring.py [--items N] [--runs N] [--batch-size N] [--json FILE]

A Llama of 57M parameters with random weights in float32; each system in a process of its own, asked in turn; medians.
Both get token ids through `_loglikelihood_tokens`, which is what lm-eval calls for every multiple-choice task, so the
tokenizer is not measured. Items are unrelated contexts of 32 to 160 tokens, or 448 tokens of examples that all have in
common and 16 to 48 of their own; 1 to 24 tokens of each are scored.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

import numpy as np
from peers import Peer
from random_model import LLAMA_350M, write_model
from rich.console import Console
from rich.table import Table

SMALL = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
CONTEXT, OWN, SHARED, SCORED = (32, 160), (16, 48), 448, (1, 24)  # tokens
VOCAB = int(str(LLAMA_350M["vocab_size"]))


def items(kind: str, count: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """Pairs of given and scored ids."""
    rng = np.random.default_rng([seed, kind == "examples in common"])

    def some(low: int, high: int) -> list[int]:
        return rng.integers(0, VOCAB, rng.integers(low, high + 1)).tolist()

    shared = some(SHARED, SHARED) if kind == "examples in common" else []
    return [(shared + some(*(OWN if shared else CONTEXT)), some(*SCORED)) for _ in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "jaxinfer-llama-57m")
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16, help="of lm-eval's hf model")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folder = str(write_model(arguments.folder, LLAMA_350M | SMALL))
    peers = {
        "jaxinfer": Peer("scoring_worker.py", "jaxinfer", folder),
        "lm-eval hf": Peer(
            "scoring_worker.py", "hf", folder, str(arguments.batch_size), str(len(os.sched_getaffinity(0)))
        ),
    }
    table = Table("items", "jaxinfer items/s", "lm-eval hf items/s", "jaxinfer is faster by", "largest difference")
    results = {}
    for kind in ("unrelated", "examples in common"):
        for peer in peers.values():
            peer.ask(items=items(kind, 32, 1000))
        seconds: dict[str, list[float]] = {name: [] for name in peers}
        difference = 0.0
        for run in range(arguments.runs):
            work = items(kind, arguments.items, run)  # others each time, or the prefix cache would know them
            answers = {name: peer.ask(items=work) for name, peer in peers.items()}
            for name, answer in answers.items():
                seconds[name].append(answer["seconds"])
            ours, theirs = (np.array(answer["logprobs"]) for answer in answers.values())
            difference = max(difference, float(np.abs(ours - theirs).max()))
        rates = {name: arguments.items / statistics.median(values) for name, values in seconds.items()}
        ratio = rates["jaxinfer"] / rates["lm-eval hf"]
        results[kind] = {"items/s": rates, "faster by": ratio, "largest difference": difference, "seconds": seconds}
        table.add_row(kind, *(f"{rate:.2f}" for rate in rates.values()), f"{ratio:.2f}", f"{difference:.1e}")
    for peer in peers.values():
        peer.close()
    Console(width=120).print(table)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
