"""Rows a second of a batch job, and its memory, with a device step that costs nothing.

    python benchmarks/batch_rows.py [--rows N] [--format jsonl|parquet] [--json] [--profile]

Everything but the device's work is real: rows are read from a file, understood, tokenized, scheduled, detokenized and
written in parts. Memory must not depend on the number of rows: after the first 10,000 it may not grow by 50 MB.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import tempfile
import threading
from pathlib import Path
from typing import Any

import psutil
from host_overhead import NARROW, replace_programs
from random_model import LLAMA_350M, write_model

from jaxinfer import LLM
from jaxinfer.batch import run

FIRST = 10_000  # rows after which memory counts
MB = 1e6


class Memory(threading.Thread):
    """Looks every half second how many rows are written, and how many bytes are resident."""

    def __init__(self, output: Path):
        super().__init__(daemon=True)
        self.output = output
        self.samples: list[tuple[int, int]] = []
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.5):
            manifest = self.output / "_manifest.json"
            if manifest.exists():
                rows = json.loads(manifest.read_text())["rows"]
                self.samples.append((rows, psutil.Process().memory_info().rss))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--format", choices=["jsonl", "parquet"], default="jsonl")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--profile", action="store_true", help="also print where the time goes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "rows.jsonl", Path(folder) / "out"
        with open(source, "w") as file:
            for i in range(arguments.rows):
                file.write(json.dumps({"id": i, "prompt": f"Row {i}: hello"}) + "\n")
        model = write_model(Path(folder) / "model", LLAMA_350M | NARROW | {"num_hidden_layers": 2})
        with LLM(model, max_num_seqs=256, max_num_batched_tokens=4096) as llm:
            replace_programs(llm, dispatch=False)
            memory = Memory(output)
            memory.start()
            profile = cProfile.Profile() if arguments.profile else None
            if profile is not None:
                profile.enable()
            options: dict[str, Any] = {"sampling_params": {"max_tokens": 1}, "format": arguments.format}
            summary = run(source, output, model=llm, **options)
            if profile is not None:
                profile.disable()
                pstats.Stats(profile).sort_stats("tottime").print_stats(40)
            memory.done.set()
    later = [size for rows, size in memory.samples if rows >= FIRST]
    figures = {
        "rows": summary.rows,
        "rows_per_second": summary.rows / summary.seconds,
        "memory_mb": later[0] / MB,
        "most_growth_mb": (max(later) - later[0]) / MB,
    }
    if arguments.json:
        print(json.dumps(figures))
    else:
        print(f"{summary.rows:,} rows, {figures['rows_per_second']:,.0f} rows/s")
        print(f"{figures['memory_mb']:.0f} MB after {FIRST:,} rows, at most {figures['most_growth_mb']:+.1f} MB later")


if __name__ == "__main__":
    main()
