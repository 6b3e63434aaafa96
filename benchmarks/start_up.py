"""The first answer of a fresh process, after a cold start and after a warm one, on the packaged and on a random model.

    python benchmarks/start_up.py [--rounds N] [--json FILE]

Cold: no program has been compiled before. Warm: the process before has compiled them. Both beside `import jax;
jax.devices()` alone, in turn; medians. Traces and compilations are counted in each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from peers import cpu_name
from rich.console import Console
from rich.table import Table

CONFIG = {  # five layers, as the packaged model has, but no program of that will do
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1999,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
ALONE = "import time; start = time.perf_counter(); import jax; jax.devices(); print(time.perf_counter() - start)"
ANSWER = """
import time
start = time.perf_counter()
import json, sys
import jax
counts = {"trace": 0, "compile": 0}
def count(name, *_, **__):
    counts["trace"] += name.endswith("jaxpr_trace_duration")
    counts["compile"] += name.endswith("backend_compile_duration")
jax.monitoring.register_event_duration_secs_listener(count)
from jaxinfer import LLM, SamplingParams
with LLM(sys.argv[1]) as llm:
    params = SamplingParams(temperature=0.0, max_tokens=12)
    llm.generate("What is 27 + 45?", params, use_tqdm=False)
    print(json.dumps({"seconds": time.perf_counter() - start, **counts}), flush=True)
"""


def run(code: str, *arguments: str, cache: str = "off") -> Any:
    """What a fresh process prints."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAXINFER_CACHE_DIR": cache}
    command = [sys.executable, "-c", code, *arguments]
    return json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from random_model import write_model

    from jaxinfer.demo import MODEL_DIR

    figures: dict[str, Any] = {"cpu": f"{cpu_name()}, {os.cpu_count()} cores", "rounds": options.rounds}
    with tempfile.TemporaryDirectory() as folder:
        models = {"packaged": str(MODEL_DIR), "random": str(write_model(Path(folder) / "model", CONFIG))}
        runs: dict[str, list[Any]] = {}
        for i in range(options.rounds):
            runs.setdefault("jax alone", []).append({"seconds": run(ALONE), "trace": 0, "compile": 0})
            for name, model in models.items():
                for start in ("cold", "warm"):
                    cache = str(Path(folder) / f"{name}{i}")
                    runs.setdefault(f"{name}, {start}", []).append(run(ANSWER, model, cache=cache))
    alone = statistics.median(each["seconds"] for each in runs["jax alone"])
    table = Table("start", "seconds", "more than JAX alone", "traces", "compilations")
    for name, each in runs.items():
        seconds = statistics.median(process["seconds"] for process in each)
        counts = [max(process[kind] for process in each) for kind in ("trace", "compile")]
        figures[name] = {"seconds": seconds, "traces": counts[0], "compilations": counts[1]}
        table.add_row(name, f"{seconds:.2f}", f"{seconds - alone:.2f}", *map(str, counts))
    Console().print(figures["cpu"], table, sep="\n")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
