"""What structured output costs: rows that write JSON of a schema, rows that write anything, and both together.

    python benchmarks/structured_output.py host [--rows N] [--calls N] [--profile]
    python benchmarks/structured_output.py model [--rows N] [--tokens N] [--runs N] [--narrow] [--json FILE]
    python benchmarks/structured_output.py tables [--rows N] [--tokens N] [--runs N] [--narrow] [--json FILE]

host: time of the host a step, with a device step that costs nothing and writes a document that is there already; a
guided row's share is the difference to the same rows without a grammar, over the rows. model: tokens/s of 0.35B random
weights (--narrow: of a few), each case after the other in every run, medians; what rows without a grammar get beside
guided ones, and requests/s of one of 50 labels against as many free tokens. tables: the same of grammars that the
device follows by tables, beside themselves by masks; labels with log-probabilities are sampled to their ends. The
tokenizer is byte-level BPE of 32,000 tokens, trained on the Python files of the standard library.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import shutil
import statistics
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from peers import cpu_name
from random_model import LLAMA_350M, write_model
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxinfer import LLM, SamplingParams
from jaxinfer.engine.guided import states
from jaxinfer.engine.programs import DecodeForward, Forward, Key, Sampled
from jaxinfer.sampling.logprobs import Logprobs

NARROW = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
NARROW |= {"num_hidden_layers": 2}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "email": {"type": "string"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "city": {"type": "string"}, "zip": {"type": "string"}},
            "required": ["street", "city", "zip"],
        },
    },
    "required": ["name", "age", "email", "tags", "address"],
    "additionalProperties": False,
}
PEOPLE = {"type": "array", "items": PERSON, "minItems": 1000}  # no row ends before the others
LABELS = [
    f"{kind} {noun}"
    for kind in ["red", "blue", "cold", "warm", "small"]
    for noun in ["fox", "car", "sun", "sea", "oak", "owl", "bee", "elk", "ant", "yak"]
]


def tokenizer_file(folder: Path) -> Path:
    """Made once."""
    path = folder / "jaxinfer-structured-output-tokenizer.json"
    if not path.exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=31_999, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
        )
        files = sorted(map(str, Path(sysconfig.get_path("stdlib")).glob("*.py")))
        tokenizer.train(files, trainer)
        tokenizer.save(str(path))
    return path


def model(folder: Path, config: dict[str, Any], name: str) -> Path:
    made = write_model(folder / name, config)
    shutil.copy(tokenizer_file(folder), made / "tokenizer.json")
    config_file = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (made / "tokenizer_config.json").write_text(json.dumps(config_file))
    return made


def document(llm: LLM, count: int) -> list[int]:
    """Tokens of a list of people."""
    person = {"name": "Ada Lovelace", "age": 36, "email": "ada@example.org", "tags": ["math", "engine"]}
    person |= {"address": {"street": "12 St James Square", "city": "London", "zip": "SW1Y 4JH"}}
    ids: list[int] = llm.tokenizer.encode(json.dumps([person] * count), add_special_tokens=False)
    return ids


def replace_programs(llm: LLM, tokens: list[int]) -> None:
    """From now on every program answers at once: the next of `tokens` for each row."""
    runner, script = llm.engine.runner, np.array(tokens, np.int32)

    def compile_nothing(key: Key) -> None:
        kind, size = key
        column = np.zeros((1, size), np.float32)
        info = Logprobs(column, column.astype(np.int32), column[..., None].astype(np.int32), column[..., None])

        def program(params: Any, state: Any, read: Any, rows: Any, sampling: Any = None, *_: Any) -> Any:
            if kind in (Forward.kind, DecodeForward.kind):
                return None, state
            length = rows.length if hasattr(rows, "length") else rows.positions + 1
            sampled = script[np.clip(length - sampling.prompt_length, 0, len(script) - 1)]
            return Sampled(sampled[None], rows.samples.copy(), info), state

        runner._executables[key] = program

    runner._compile = compile_nothing  # type: ignore[method-assign]


def host(arguments: argparse.Namespace, console: Console) -> None:
    profile = cProfile.Profile() if arguments.profile else None
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(tokenizer_file(Path(tempfile.gettempdir())), folder)
        path = model(Path(folder), LLAMA_350M | NARROW, "narrow")
        with LLM(path, max_num_seqs=arguments.rows, max_num_batched_tokens=2048) as llm:
            tokens = document(llm, 40)
            replace_programs(llm, tokens)
            llm.engine.runner.max_steps = 1
            cases = {"free": {}, "guided": {"structured_outputs": {"json": PEOPLE}}}
            table = Table("rows", "median ms a step", "p99", "us a guided row and token")
            medians = []
            for name, more in cases.items():
                params = SamplingParams(temperature=1.0, seed=1, max_tokens=len(tokens), **more)
                groups = [llm.engine.add([1, 2, 3, i], params) for i in range(arguments.rows)]
                seconds = []
                for i in range(arguments.calls + 5):
                    if profile is not None and more:
                        profile.enable()
                    start = time.perf_counter()
                    llm.engine.step()
                    if i >= 5:
                        seconds.append(time.perf_counter() - start)
                    if profile is not None:
                        profile.disable()
                assert all(group.members[0].error is None for group in groups)
                for group in groups:
                    llm.engine.abort(group)
                medians.append(statistics.median(seconds))
                share = f"{1e6 * (medians[-1] - medians[0]) / arguments.rows:.1f}" if more else ""
                table.add_row(name, f"{1e3 * medians[-1]:.3f}", f"{1e3 * np.percentile(seconds, 99):.3f}", share)
    console.print(table)
    if profile is not None:
        pstats.Stats(profile).sort_stats("tottime").print_stats(20)


def whole(arguments: argparse.Namespace, console: Console) -> None:
    folder = Path(tempfile.gettempdir())
    config = LLAMA_350M | NARROW if arguments.narrow else LLAMA_350M
    path = model(folder, config, f"jaxinfer-structured-output-{'narrow' if arguments.narrow else '350m'}")
    n, tokens = arguments.rows, arguments.tokens
    free = SamplingParams(temperature=1.0, seed=1, max_tokens=tokens, ignore_eos=True, detokenize=True)
    guided = free.with_changes(structured_outputs={"json": PEOPLE})
    label = SamplingParams(temperature=1.0, seed=1, max_tokens=16, structured_outputs={"choice": LABELS})
    with LLM(path, max_num_seqs=n, max_num_batched_tokens=max(512, n)) as llm:
        short = max(1, round(statistics.fmean(len(llm.tokenizer.encode(text)) for text in LABELS)))
        prompts = [np.random.default_rng(i).integers(0, 256, 16).tolist() for i in range(n)]
        cases = {
            "free": [free] * n,
            "guided": [guided] * n,
            "half guided": [guided, free] * (n // 2),
            "one guided": [guided] + [free] * (n - 1),
            f"free, {short} tokens": [free.with_changes(max_tokens=short)] * n,
            "one of 50 labels": [label] * n,
        }
        rates: dict[str, list[float]] = {name: [] for name in cases}
        for run in range(arguments.runs + 1):
            for name, params in cases.items():
                start = time.perf_counter()
                outputs = llm.generate(prompts, params, use_tqdm=False)
                seconds = time.perf_counter() - start
                assert all(output.error is None for output in outputs)
                done = sum(len(output.outputs[0].token_ids) for output in outputs)
                if run:  # the first one compiles
                    rates[name].append((n if "label" in name or "," in name else done) / seconds)
    table, results = Table("rows", "tokens/s, or requests/s", "of free"), {}
    for name, values in rates.items():
        against = f"free, {short} tokens" if "label" in name or "," in name else "free"
        ratio = statistics.median(a / b for a, b in zip(values, rates[against], strict=True))
        results[name] = {"rates": values, "ratio": ratio}
        table.add_row(name, f"{statistics.median(values):.1f}", f"{ratio:.3f}")
    console.print(table)
    write(arguments, results)


def tables_beside_masks(arguments: argparse.Namespace, console: Console) -> None:
    config = LLAMA_350M | NARROW if arguments.narrow else LLAMA_350M
    name = f"jaxinfer-structured-output-{'narrow' if arguments.narrow else '350m'}"
    n, built_in = arguments.rows, states.BUILT_IN
    free = SamplingParams(temperature=1.0, seed=1, max_tokens=arguments.tokens, ignore_eos=True)
    regex = free.with_changes(structured_outputs={"regex": "[a-z ]+"})
    label = SamplingParams(temperature=1.0, seed=1, max_tokens=16, structured_outputs={"choice": LABELS})
    rows = max(512, n)
    with LLM(model(Path(tempfile.gettempdir()), config, name), max_num_seqs=n, max_num_batched_tokens=rows) as llm:
        prompts = [np.random.default_rng(i).integers(0, 256, 16).tolist() for i in range(n)]

        def generate(params: list[SamplingParams], way: str) -> tuple[float, list[list[int]]]:
            """Seconds and tokens. way: table or masks."""
            states.BUILT_IN = 1.0 if way == "table" else -1.0  # also on a busy machine
            llm.engine.guides._tables.clear()
            llm.engine.check(prompts[0], params[0])  # a grammar is understood before
            before, start = llm.stats.table_tokens, time.perf_counter()
            outputs = llm.generate(prompts, params, use_tqdm=False)
            seconds = time.perf_counter() - start
            guided = any(p.structured_outputs is not None for p in params)
            assert (llm.stats.table_tokens > before) == (guided and way == "table")
            assert all(output.error is None for output in outputs)
            return seconds, [output.outputs[0].token_ids for output in outputs]

        lengths = [len(tokens) for tokens in generate([label] * n, "masks")[1]]
        as_long = [free.with_changes(max_tokens=length) for length in lengths]
        cases = {  # rows, and those that they are measured by
            "free": ([free] * n, ""),
            "regex": ([regex] * n, "free"),
            "half regex": ([regex, free] * (n // 2), "free"),
            "one regex": ([regex] + [free] * (n - 1), "free"),
            "free, as labels": (as_long, ""),
            "labels": ([label] * n, "free, as labels"),
            "free, as labels, logprobs": ([p.with_changes(logprobs=0) for p in as_long], ""),
            "labels, logprobs": ([label.with_changes(logprobs=0)] * n, "free, as labels, logprobs"),
        }
        spent: dict[tuple[str, str], list[float]] = {}
        for run in range(arguments.runs + 1):
            for case, (params, against) in cases.items():
                texts = []
                for way in ("table", "masks") if against else ("",):
                    seconds, tokens = generate(params, way)
                    texts.append(tokens)
                    if run:  # the first one compiles
                        spent.setdefault((case, way), []).append(seconds)
                assert all(text == texts[0] for text in texts)
    states.BUILT_IN = built_in
    table, results = Table("rows", "by", "seconds", "speed, of free rows"), {}
    for (case, way), values in spent.items():
        free_rows = spent.get((cases[case][1], ""), values)
        ratio = statistics.median(a / b for a, b in zip(free_rows, values, strict=True))
        results[f"{case}, {way}"] = {"seconds": statistics.median(values), "ratio": ratio}
        table.add_row(case, way, f"{statistics.median(values):.3f}", f"{ratio:.3f}")
    console.print(table)
    write(arguments, results)


def write(arguments: argparse.Namespace, results: dict[str, Any]) -> None:
    if arguments.json is not None:
        about = {"cpu": cpu_name(), "rows": arguments.rows, "cases": results}
        arguments.json.write_text(json.dumps(about, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["host", "model", "tables"])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--calls", type=int, default=400)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--narrow", action="store_true")
    parser.add_argument("--profile", action="store_true", help="also print where the time goes")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    {"host": host, "model": whole, "tables": tables_beside_masks}[arguments.what](arguments, Console())


if __name__ == "__main__":
    main()
