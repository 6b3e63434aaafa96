"""jaxinfer beside llama.cpp and transformers on the same weights: tokens/s of prefill and decode on CPU.

    python benchmarks/vs_llama_cpp.py [--model MODEL] [--llama-python PYTHON] [--folder DIR] [--json FILE]

PYTHON has llama-cpp-python and gguf (`pip install llama-cpp-python gguf safetensors`), perhaps in an environment of its
own. Builds a model with random weights, a 0.35B Llama, a 1B Qwen3-MoE or a 0.34B Qwen3.5, and GGUF files of it beside
it; starts each system in a process of its own and asks them in turn. Prompt 128, 64 new tokens, medians of interleaved
runs; see vs_transformers.py.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from peers import Peer, cpu_name
from random_model import MODELS, write_model
from rich.console import Console
from rich.table import Table
from vs_transformers import measure

# What is compared: batch, phase, ours, theirs, and the ratio that is wanted.
WANTED = {}
WANTED["llama"] = [
    (1, "decode", "jaxinfer int8", "llama.cpp q8_0", 1.0),
    (1, "decode", "jaxinfer int8", "transformers bfloat16", 3.0),
    (1, "decode", "jaxinfer bfloat16", "llama.cpp bf16", 0.95),
    (1, "decode", "jaxinfer float32", "llama.cpp f32", 1.1),
    (1, "prefill", "jaxinfer int8", "llama.cpp q8_0", 1.0),
    (1, "prefill", "jaxinfer int8-w8a8", "transformers bfloat16", 1.0),
    (1, "prefill", "jaxinfer bfloat16", "transformers bfloat16", 0.8),
    (16, "decode", "jaxinfer float32", "transformers float32", 1.5),
    (16, "decode", "jaxinfer int8", "transformers bfloat16", 1.5),
    (16, "decode", "jaxinfer int8", "llama.cpp q8_0", 1.0),
]
WANTED["qwen3-moe"] = [
    (batch, phase, ours, theirs, wanted)
    for ours, theirs, wanted in (
        ("jaxinfer int8", "llama.cpp q8_0", 1.0),
        ("jaxinfer int8", "transformers bfloat16", 3.0),
        ("jaxinfer bfloat16", "llama.cpp bf16", 1.0),
        ("jaxinfer bfloat16", "transformers bfloat16", 1.0),
    )
    for batch in (1, 16)
    for phase in ("decode", "prefill")
]
WANTED["qwen3.5"] = [
    (batch, phase, ours, theirs, 1.0)
    for ours, theirs in (
        ("jaxinfer float32", "llama.cpp f32"),
        ("jaxinfer bfloat16", "llama.cpp bf16"),
        ("jaxinfer int8", "llama.cpp q8_0"),
    )
    for batch in (1, 16)
    for phase in ("decode", "prefill")
]
SYSTEMS = {
    "llama": (
        *("jaxinfer float32", "jaxinfer bfloat16", "jaxinfer int8", "jaxinfer int8-w8a8"),
        *("transformers float32", "transformers bfloat16", "llama.cpp q8_0", "llama.cpp bf16", "llama.cpp f32"),
    ),
    "qwen3-moe": (
        *("jaxinfer bfloat16", "jaxinfer int8", "jaxinfer int8-w8a8", "jaxinfer int4", "transformers bfloat16"),
        *("llama.cpp bf16", "llama.cpp q8_0", "llama.cpp q4_0"),
    ),
    "qwen3.5": (
        *("jaxinfer float32", "jaxinfer bfloat16", "jaxinfer int8", "jaxinfer int8-w8a8"),
        *("llama.cpp f32", "llama.cpp bf16", "llama.cpp q8_0"),
    ),
}


def copy_bandwidth(threads: int, size: int = 2**28, repeats: int = 5) -> float:
    """Bytes read and written a second by all threads copying at once, the best of some times."""
    arrays = [(np.ones(size // threads, np.uint8), np.ones(size // threads, np.uint8)) for _ in range(threads)]
    best = 0.0
    for _ in range(repeats):
        workers = [threading.Thread(target=np.copyto, args=pair) for pair in arrays]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = max(best, 2 * size / (time.perf_counter() - start))
    return best


def gguf_file(folder: Path, kind: str, python: str) -> Path:
    """Beside the folder; made if it is not there."""
    file = folder.with_name(f"{folder.name}-{kind}.gguf")
    if not file.exists():
        half = file.with_suffix(".part")
        writer = Path(__file__).with_name("write_gguf.py")
        subprocess.run([python, str(writer), str(folder), str(half), kind], check=True)
        half.rename(file)
    return file


def start(system: str, folder: Path, llama_python: str, threads: int) -> Peer:
    """Of a system's name and format."""
    name, kind = system.split()
    if name == "transformers":
        return Peer("worker_transformers.py", str(folder), kind, str(threads))
    if name == "jaxinfer":
        return Peer("worker_jaxinfer.py", str(folder), *([kind] if "float" in kind else ["bfloat16", kind]))
    file = gguf_file(folder, kind, llama_python)
    return Peer("worker_llama_cpp.py", str(file), str(threads), python=llama_python)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SYSTEMS, default="llama")
    parser.add_argument("--systems", nargs="+", help='like "jaxinfer int8", "llama.cpp q8_0"; all of the model\'s')
    parser.add_argument("--folder", type=Path, help="of the model, which is made if it is not there")
    parser.add_argument("--llama-python", default=sys.executable)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--runs-of-16", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    name, config = MODELS[arguments.model]
    folder = write_model(arguments.folder or Path(tempfile.gettempdir()) / name, config)
    cores = len(os.sched_getaffinity(0))
    systems = arguments.systems or SYSTEMS[arguments.model]
    peers = {system: start(system, folder, arguments.llama_python, cores) for system in systems}
    vocab, prompt, new = int(str(config["vocab_size"])), arguments.prompt, arguments.new
    bandwidth = [copy_bandwidth(cores)]
    results = {1: measure(peers, 1, arguments.runs, prompt, new, vocab)}
    bandwidth.append(copy_bandwidth(cores))
    if arguments.runs_of_16:
        results[16] = measure(peers, 16, arguments.runs_of_16, prompt, new, vocab)
    again = [list(range(3, 3 + prompt))]  # nothing new to compile
    peaks = {name: peer.ask(prompts=again, new_tokens=1)["peak"] for name, peer in peers.items()}
    for peer in peers.values():
        peer.close()

    console = Console(width=120)
    copied = statistics.median(bandwidth)
    console.print(f"{cores} threads; copying memory: {copied / 1e9:.1f} GB/s, read and written")
    table = Table("batch", "system", "prefill tok/s", "decode tok/s", "weights read, of copying", "same tokens")
    for batch, result in results.items():
        for name, row in result.items():
            read = peers[name].ready.get("read")
            share = f"{read * row['decode'] / copied:.0%}" if read and batch == 1 else ""
            speeds = f"{row['prefill']:.0f}", f"{row['decode']:.1f}"
            table.add_row(str(batch), name, *speeds, share, f"{row['same_tokens']:.1%}")
    console.print(table)
    table = Table("batch", "phase", "ours", "theirs", "of medians", "run by run", "wanted")
    for batch, phase, system, reference, wanted in WANTED[arguments.model]:
        if batch in results and {system, reference} <= set(peers):
            mine, its = results[batch][system], results[batch][reference]
            pairs = zip(mine[f"{phase}_runs"], its[f"{phase}_runs"], strict=True)
            # Where the machine's speed changes while this runs, the median of the ratios says more.
            ratios = mine[phase] / its[phase], statistics.median(a / b for a, b in pairs), wanted
            table.add_row(str(batch), phase, system, reference, *(f"{ratio:.2f}" for ratio in ratios))
    console.print(table)
    table = Table(
        "system", "weights MB", "KV pool MB", "peak resident MB", "peak without pool / (1.2 weights + 700 MB)"
    )
    for name, peer in peers.items():
        weights, pool, peak = (n / 1e6 for n in (peer.ready["weights"], peer.ready["cache"], peaks[name]))
        share = f"{(peak - pool) / (1.2 * weights + 700):.2f}"
        table.add_row(name, f"{weights:.0f}", f"{pool:.0f}", f"{peak:.0f}", share)
    console.print(table)
    if arguments.json is not None:
        ready = {name: peer.ready | {"peak": peaks[name]} for name, peer in peers.items()}
        report = {"cpu": cpu_name(), "results": results, "memory": ready, "copy_bandwidth": bandwidth}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
