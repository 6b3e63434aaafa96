"""What rows pay for a neighbour whose grammar is an attack: gaps between their tokens, with and without it.

    python benchmarks/hostile_grammars.py [--rows N] [--tokens N] [--runs N] [--narrow] [--json F]

0.35B random weights (--narrow: of a few). In each run the same rows write free text alone, then with one attack after
the other beside them, which is served or ends in an error of its own; medians over runs of the 99th percentile of gaps.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from peers import cpu_name
from random_model import LLAMA_350M
from rich.console import Console
from rich.table import Table
from structured_output import NARROW, model

from jaxinfer import AsyncEngine, RequestError, SamplingParams


def wide(count: int) -> str:
    return json.dumps({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(count)}})


def nested(depth: int) -> str:
    return '{"type": "array", "items": ' * depth + '{"type": "null"}' + "}" * depth


def chain(count: int) -> str:
    parts = {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(count)}
    return json.dumps({"$ref": "#/$defs/d0", "$defs": parts | {f"d{count}": {}}})


def doubled(count: int) -> str:
    return "start: T0\n" + "".join(f"T{i}: T{i + 1} T{i + 1}\n" for i in range(count)) + f'T{count}: "a"*\n'


ATTACKS: dict[str, dict[str, Any]] = {
    "regex (a|aa)+ nested": {"regex": "((((a|aa)+|a{1,50}){1,50}){1,50}){1,50}b"},
    "regex of 2**60 states": {"regex": "(a|b)*a(a|b){60}" * 20},
    "schema of 5 MB": {"json": wide(170_000)},
    "schema of 1 MB": {"json": wide(33_000)},
    "100,000 values": {"json": json.dumps({"enum": [f"v{i}" for i in range(100_000)]})},
    "40,000 values": {"json": json.dumps({"enum": [f"value number {i}" for i in range(40_000)]})},
    "depth 10,000": {"json": nested(10_000)},
    "chain of 4,000 $refs": {"json": chain(4_000)},
    "12,000 choices": {"choice": [f"value number {i}" for i in range(12_000)]},
    "terminals of 2**40 parts": {"grammar": doubled(40)},
    "a{100000}": {"regex": "a{100000}"},
    "constant of 240 KB": {"json": json.dumps({"const": "a b" * 80_000})},
}


async def measure(
    engine: AsyncEngine, rows: int, tokens: int, attack: dict[str, Any] | None
) -> tuple[float, float, str]:
    """The 99th percentile of gaps, the seconds until the attack's first token or error, and what came of it."""
    free = SamplingParams(temperature=1.0, seed=1, max_tokens=tokens, ignore_eos=True)
    gaps: list[float] = []
    took, end = 0.0, ""

    async def row(i: int) -> None:
        before = None
        async for _ in engine.generate([1, 2, 3, i], free):
            now = time.perf_counter()
            if before is not None:
                gaps.append(now - before)
            before = now

    async def attacks() -> None:
        nonlocal took, end
        await asyncio.sleep(0.5)
        start = time.perf_counter()
        try:
            params = SamplingParams(temperature=1.0, max_tokens=tokens, structured_outputs=attack)
            async for output in engine.generate([1, 2, 3], params):
                took = took or time.perf_counter() - start
                end = output.error or "served"
        except RequestError as error:
            took, end = time.perf_counter() - start, str(error)

    await asyncio.gather(*(row(i) for i in range(rows)), *([attacks()] if attack is not None else []))
    return float(np.percentile(gaps, 99)), took, end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--narrow", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folder = Path(tempfile.gettempdir())
    config = LLAMA_350M | NARROW if arguments.narrow else LLAMA_350M
    path = model(folder, config, f"jaxinfer-structured-output-{'narrow' if arguments.narrow else '350m'}")
    cases: dict[str, dict[str, Any] | None] = {"none": None, **ATTACKS}
    gaps: dict[str, list[float]] = {name: [] for name in cases}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    ends: dict[str, str] = {}
    engine = AsyncEngine(path, max_num_seqs=16, warmup=True)
    try:
        for run in range(arguments.runs + 1):
            for name, attack in cases.items():
                p99, took, ends[name] = asyncio.run(measure(engine, arguments.rows, arguments.tokens, attack))
                if run:
                    gaps[name].append(p99)
                    seconds[name].append(took)
    finally:
        engine.close()
    table = Table("beside", "p99 of gaps, ms", "of none", "first token or error after, s", "which")
    for name, values in gaps.items():
        ratio = statistics.median(a / b for a, b in zip(values, gaps["none"], strict=True))
        row = f"{1e3 * statistics.median(values):.1f}", f"{ratio:.2f}", f"{statistics.median(seconds[name]):.2f}"
        table.add_row(name, *row, ends[name][:100])
    console = Console()
    console.print(f"{cpu_name()}, {arguments.rows} rows")
    console.print(table)
    if arguments.json is not None:
        arguments.json.write_text(
            json.dumps({"cpu": cpu_name(), "p99": gaps, "seconds": seconds, "ends": ends}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
