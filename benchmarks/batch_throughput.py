"""Rows a second of a batch job beside `LLM.generate` on the same prompts, already in memory.

    python benchmarks/batch_throughput.py [--rows N] [--runs N] [--json FILE]

A Llama with random weights in float32; prompts of 16 to 256 tokens and outputs of 8 to 64, of which no end-of-text
ends any. The job reads them from a JSON Lines file and writes parts; both take turns in one process, each run with
prompts of its own; medians. The prefix cache is off, or the second one would find the first one's prompts there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from random_model import LLAMA_350M, write_model

from jaxinfer import LLM, SamplingParams
from jaxinfer.batch import run

SMALLER = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
LETTERS = "abcdefghijklmnopqrstuvwxyz     "  # the tokenizer has a token for each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "jaxinfer-llama-smaller")
    parser.add_argument("--rows", type=int, default=192)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rates: dict[str, list[float]] = {"batch job": [], "LLM.generate": []}
    with (
        tempfile.TemporaryDirectory() as folder,
        LLM(write_model(arguments.folder, LLAMA_350M | SMALLER), enable_prefix_caching=False, warmup=True) as llm,
    ):
        for number in range(-1, arguments.runs):  # the first is a warm-up
            rng = np.random.default_rng(number + 1)
            count = arguments.rows if number >= 0 else 16
            prompts = ["".join(rng.choice(list(LETTERS), rng.integers(16, 257))) for _ in range(count)]
            lengths = rng.integers(8, 65, count).tolist()
            source, output = Path(folder) / f"{number}.jsonl", Path(folder) / f"out{number}"
            rows = [
                {"prompt": prompt, "params": {"max_tokens": length, "ignore_eos": True}}
                for prompt, length in zip(prompts, lengths, strict=True)
            ]
            source.write_text("".join(json.dumps(row) + "\n" for row in rows))
            greedy = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in lengths]
            turns = ["batch job", "LLM.generate"] if number % 2 else ["LLM.generate", "batch job"]
            for name in turns:
                begun = time.perf_counter()
                if name == "batch job":
                    run(source, output, model=llm)
                else:
                    llm.generate(prompts, greedy, use_tqdm=False)
                if number >= 0:
                    rates[name].append(count / (time.perf_counter() - begun))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    share = medians["batch job"] / medians["LLM.generate"]
    for name, rate in medians.items():
        print(f"{name:>12}: {rate:.1f} rows/s ({min(rates[name]):.1f} to {max(rates[name]):.1f})")
    print(f"the job reaches {share:.1%} of LLM.generate")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"rows_per_second": rates, "share": share}, indent=1) + "\n")


if __name__ == "__main__":
    main()
