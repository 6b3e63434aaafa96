"""Rows a second of a batch job, and its memory, with a device step that costs nothing.

    python benchmarks/batch_rows.py [--task generate|embed] [--rows N] [--format jsonl|parquet] [--kills N] [--json]

Everything but the device's work is real: rows are read from a file, understood, tokenized, scheduled, detokenized and
written in parts; vectors are the sums of random ones of a text's tokens. Memory must not depend on the number of rows:
after the first 10,000 it may not grow by 50 MB. With --kills the job runs once more, in processes that are killed so
many times at random moments, and must write the same bytes.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import random
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil
from host_overhead import NARROW, replace_programs
from random_model import LLAMA_350M, write_model

from jaxinfer import LLM
from jaxinfer.batch import Summary, run
from jaxinfer.engine.programs import Key

FIRST = 10_000  # rows after which memory counts
SHOWN = 8  # points in between
MB = 1e6
OPTIONS: dict[str, dict[str, Any]] = {
    "generate": {"max_num_seqs": 256, "max_num_batched_tokens": 4096},
    "embed": {"convert": "embed", "max_num_batched_tokens": 4096},
}


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


def replace_pooling(llm: LLM) -> None:
    """From now on every program answers at once."""
    loaded = llm.loaded
    assert loaded is not None
    engine, shape = loaded.engine, (llm.tokenizer.vocab_size, loaded.size)
    sums = np.random.default_rng(0).standard_normal(shape, np.float32)

    def compile_nothing(key: Key) -> None:
        def program(params: Any, state: Any, read: Any, batch: Any) -> Any:
            ends, rows = batch.cu_q_lens, len(batch.kv_lens)
            values = np.zeros((rows, sums.shape[1]), np.float32)
            used = np.flatnonzero(batch.kv_lens)
            values[used] = np.add.reduceat(sums[batch.tokens[: ends[-1]]], ends[used])
            return jax.device_put(values), state

        engine._executables[key] = program  # type: ignore[assignment]

    engine._compile = compile_nothing  # type: ignore[method-assign]


def work(folder: Path, output: Path, task: str, format: Any, profile: cProfile.Profile | None = None) -> Summary:
    with LLM(folder / "model", **OPTIONS[task]) as llm:
        if task == "embed":
            replace_pooling(llm)
        else:
            replace_programs(llm, dispatch=False)
        options: dict[str, Any] = {"task": task, "format": format}
        if task == "generate":
            options["sampling_params"] = {"max_tokens": 1}
        if profile is not None:
            profile.enable()
        summary = run(folder / "rows.jsonl", output, model=llm, **options)
        if profile is not None:
            profile.disable()
        return summary


def kill(folder: Path, command: list[str], kills: int, seconds: float) -> int:
    """Runs a job, and kills it `kills` times within `seconds`, its own time; returns how often it began again."""
    starts = 0
    for _ in range(kills):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        manifest, rows = folder / "killed" / "_manifest.json", -1
        try:
            # Within the job and not while Python starts.
            before = json.loads(manifest.read_text())["parts"] if manifest.exists() else 0
            while process.poll() is None and rows <= before:
                rows = json.loads(manifest.read_text())["parts"] if manifest.exists() else -1
            process.wait(random.uniform(0, seconds / kills))
        except subprocess.TimeoutExpired:
            process.kill()
            starts += 1
        process.wait()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return starts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(OPTIONS), default="generate")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--format", choices=["jsonl", "parquet"], default="jsonl")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--profile", action="store_true", help="also print where the time goes")
    parser.add_argument("--again", type=Path, help=argparse.SUPPRESS)  # the folder of a job that is killed
    arguments = parser.parse_args()
    if arguments.again is not None:
        work(arguments.again, arguments.again / "killed", arguments.task, arguments.format)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with open(folder / "rows.jsonl", "w") as file:
            for i in range(arguments.rows):
                file.write(json.dumps({"id": i, "prompt": f"Row {i}: hello"}) + "\n")
        write_model(folder / "model", LLAMA_350M | NARROW | {"num_hidden_layers": 2})
        memory = Memory(folder / "out")
        memory.start()
        profile = cProfile.Profile() if arguments.profile else None
        summary = work(folder, folder / "out", arguments.task, arguments.format, profile)
        memory.done.set()
        if profile is not None:
            pstats.Stats(profile).sort_stats("tottime").print_stats(40)
        later = [(rows, size) for rows, size in memory.samples if rows >= FIRST]
        figures: dict[str, Any] = {
            "rows": summary.rows,
            "rows_per_second": summary.rows / summary.seconds,
            "memory_mb": later[0][1] / MB,
            "most_growth_mb": (max(size for _, size in later) - later[0][1]) / MB,
            "points": [(rows, size / MB) for rows, size in later[:: max(1, len(later) // SHOWN)]],
        }
        if arguments.kills:
            command = [
                sys.executable,
                __file__,
                "--again",
                name,
                "--task",
                arguments.task,
                "--format",
                arguments.format,
            ]
            figures["kills"] = kill(folder, command, arguments.kills, summary.seconds)
            parts = [sorted((folder / output).glob("part-*")) for output in ("out", "killed")]
            figures["same"] = len(parts[0]) == len(parts[1]) and all(
                one.read_bytes() == other.read_bytes() for one, other in zip(*parts, strict=True)
            )
    if arguments.json:
        print(json.dumps(figures))
        return
    print(f"{summary.rows:,} rows, {figures['rows_per_second']:,.0f} rows/s")
    print("resident: " + ", ".join(f"{size:.0f} MB after {rows:,}" for rows, size in figures["points"]))
    print(f"{figures['memory_mb']:.0f} MB after {FIRST:,} rows, at most {figures['most_growth_mb']:+.1f} MB later")
    if arguments.kills:
        print(f"killed {figures['kills']} times: {'the same' if figures['same'] else 'NOT THE SAME'}")


if __name__ == "__main__":
    main()
