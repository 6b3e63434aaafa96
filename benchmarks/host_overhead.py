"""Host time per device call, with a device step that costs nothing: 256 rows decode one token a call, as text.

    python benchmarks/host_overhead.py [--rows N] [--calls N] [--profile]

Everything but the device's work is real: scheduling, the arguments of the call, detokenizing, looking for stops. Where
a compiled program would run, tokens are ready at once. With --dispatch a compiled program with the same arguments and
results does run but computes nothing: what JAX's own part of a call costs is the difference. In the last case each row
has an output length of its own, and is followed by a new prompt.
"""

from __future__ import annotations

import argparse
import cProfile
import dataclasses
import pstats
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from random_model import LLAMA_350M, write_model
from rich.console import Console
from rich.table import Table

from jaxinfer import LLM, SamplingParams
from jaxinfer.engine.generation import RequestGroup
from jaxinfer.engine.programs import Forward, Key, Sampled
from jaxinfer.sampling.logprobs import Logprobs

PROMPTS = range(128, 144)  # tokens: sequences fill their pages at different times
NARROW = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
CASES = {
    "decoding": SamplingParams(max_tokens=None),
    "decoding, a stop string": SamplingParams(max_tokens=None, stop=["\n\n\n"]),
    "coming and going, 128 tokens each": SamplingParams(max_tokens=128),
}


def replace_programs(llm: LLM, dispatch: bool) -> None:
    """From now on every program answers at once with tokens that the byte-level tokenizer has."""
    runner = llm.engine.runner
    runner.max_steps = 1
    others = [i for i in range(llm.tokenizer.vocab_size) if llm.tokenizer.decode([i]) != "\n"]

    def compile_nothing(key: Key) -> None:
        kind, rows = key
        tokens = np.random.default_rng(rows).choice(others, (1, rows)).astype(np.int32)
        column = np.zeros((1, rows), np.float32)
        info = Logprobs(column, column.astype(np.int32), column[..., None].astype(np.int32), column[..., None])

        def program(params: Any, state: Any, read: Any, rows: Any, *_: Any) -> Any:
            if kind == Forward.kind:
                return None, state
            return Sampled(tokens, rows.samples if dispatch else rows.samples.copy(), info), state

        if dispatch:
            jitted = jax.jit(program, donate_argnums=1, keep_unused=True)
            runner._executables[key] = jitted.lower(*runner.programs[key].arguments).compile()
        else:
            runner._executables[key] = program

    runner._compile = compile_nothing  # type: ignore[method-assign]


def measure(llm: LLM, rows: int, calls: int, params: SamplingParams, profile: cProfile.Profile | None) -> list[float]:
    """Seconds of each Engine.step while all rows decode. Where `params` bound the output, rows end and others begin."""
    engine = llm.engine
    rng = np.random.default_rng(1)
    changing = params.max_tokens is not None

    def add(i: int) -> RequestGroup:
        length = int(rng.integers(1, 2 * params.max_tokens)) if changing else None
        row_params = dataclasses.replace(params, temperature=0.0, ignore_eos=True, max_tokens=length)
        return engine.add(rng.integers(0, 256, PROMPTS[i % len(PROMPTS)]).tolist(), row_params)

    groups = [add(i) for i in range(rows)]
    while not changing and not all(group.members[0].request.decoding for group in groups):
        engine.step()
    for _ in range(4):
        engine.step()
    seconds = []
    for _ in range(calls):
        if profile is not None:
            profile.enable()
        start = time.perf_counter()
        touched = engine.step()
        seconds.append(time.perf_counter() - start)
        if profile is not None:
            profile.disable()
        assert changing or len(touched) == rows
        assert all(generation.text for generation in touched if generation.finished)
        for i in [i for i, group in enumerate(groups) if group.finished]:
            groups[i] = add(i)
    for group in groups:
        engine.abort(group)
    while engine.step():
        pass
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--calls", type=int, default=400)
    parser.add_argument("--dispatch", action="store_true")
    parser.add_argument("--profile", action="store_true", help="also print where the time goes")
    arguments = parser.parse_args()
    table = Table("requests", "median ms a call", "mean", "p90", "p99")
    profile = cProfile.Profile() if arguments.profile else None
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "model", LLAMA_350M | NARROW)
        with LLM(Path(folder) / "model", max_num_seqs=arguments.rows, max_num_batched_tokens=2048) as llm:
            replace_programs(llm, arguments.dispatch)
            for name, params in CASES.items():
                seconds = measure(llm, arguments.rows, arguments.calls, params, profile)
                figures = [statistics.median(seconds), statistics.fmean(seconds), *np.percentile(seconds, (90, 99))]
                table.add_row(name, *(f"{1000 * figure:.2f}" for figure in figures))
    Console().print(table)
    if profile is not None:
        pstats.Stats(profile).sort_stats("tottime").print_stats(30)


if __name__ == "__main__":
    main()
