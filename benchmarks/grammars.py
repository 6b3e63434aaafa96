"""Grammars on CPU: how long the first mask takes, and each one after it, jaxinfer's beside outlines-core's.

    python benchmarks/grammars.py --peer-python P [--runs N] [--json FILE]

P is a Python with numpy, tokenizers and outlines-core. CPU time, in which nothing is kept from one run to the next.
Each system is in a process of its own, asked in turn; medians, and of masks the slowest in a hundred, too. The
tokenizer is that of structured_output.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from peers import Peer, cpu_name
from random_model import LLAMA_350M
from rich.console import Console
from rich.table import Table
from structured_output import LABELS, PERSON, model
from tokenizers import Tokenizer

ADA = {
    "name": "Ada Lovelace",
    "age": 36,
    "email": "ada@example.org",
    "tags": ["math", "engine"],
    "address": {"street": "12 St James Square", "city": "London", "zip": "SW1Y 4JH"},
}
SUMMARY = {
    "type": "object",
    "properties": {"summary": {"type": "string", "maxLength": 200}, "mood": {"enum": ["good", "bad"]}},
    "required": ["summary", "mood"],
    "additionalProperties": False,
}
TEXT = "It begins with a house at the sea, and ends with another one in the hills. Nothing else happens."
DATE_TIME = r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])T([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]Z"
CASES: dict[str, tuple[str, Any, str]] = {  # kind, what is asked for, a text of it
    "JSON: a person": ("json", PERSON, json.dumps(ADA)),
    "JSON: 200 characters": ("json", SUMMARY, json.dumps({"summary": TEXT, "mood": "good"})),
    "a date and time": ("regex", DATE_TIME, "2026-11-30T05:00:00Z"),
    "one of 50 labels": ("choice", LABELS, LABELS[-1]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folder = model(Path(tempfile.gettempdir()), LLAMA_350M, "jaxinfer-structured-output-350m")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    options = str(folder), str(LLAMA_350M["vocab_size"])
    peers = {
        "jaxinfer": Peer("grammars_worker.py", "jaxinfer", *options),
        "outlines-core": Peer("grammars_worker.py", "outlines-core", *options, python=arguments.peer_python),
    }
    results: dict[str, Any] = {"cpu": cpu_name()}
    table = Table("grammar", "system", "first mask, ms", "a token, us", "slowest in 100, us")
    for case, (kind, value, text) in CASES.items():
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        answers: dict[str, list[dict[str, Any]]] = {name: [] for name in peers}
        for _ in range(arguments.runs):
            for name, peer in peers.items():
                answers[name].append(peer.ask(kind=kind, value=value, ids=ids))
        results[case] = {}
        for name, of in answers.items():
            first = statistics.median(answer["first"] for answer in of)
            steps = np.array([step for answer in of for step in answer["steps"]])
            row = {"first": first, "median": float(np.median(steps)), "p99": float(np.percentile(steps, 99))}
            results[case][name] = row
            table.add_row(case, name, f"{1e3 * first:.2f}", f"{1e6 * row['median']:.1f}", f"{1e6 * row['p99']:.0f}")
    for peer in peers.values():
        peer.close()
    Console(width=120).print(table)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
