"""What adapters cost while decoding: rows of one, rows of eight, and rows of none where others have some.

    python benchmarks/adapters.py [--dtype D] [--quantization S] [--rank N] [--tokens N] [--runs N] [--peft] [--json F]

0.35B random weights and random adapters on all linears of their layers. In each run one case after the other; ratios
are medians over the runs. The bound is what reading alone would allow: the bytes of the base over those and of the
adapters that rows of the case have. --peft: besides, peft's own decoding with one adapter and none, on torch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from peers import cpu_name
from random_model import LLAMA_350M, write_model
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save_file

from jaxinfer import LLM, SamplingParams

COUNT = 8
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def write_adapter(folder: Path, config: dict[str, Any], rank: int, seed: int) -> Path:
    """In PEFT's format, all of it random."""
    random = np.random.default_rng(seed)
    wide, hidden = config["hidden_size"], config["intermediate_size"]
    kv = wide // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {"q_proj": (wide, wide), "k_proj": (kv, wide), "v_proj": (kv, wide), "o_proj": (wide, wide)}
    shapes |= {"gate_proj": (hidden, wide), "up_proj": (hidden, wide), "down_proj": (wide, hidden)}
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, (rows, columns) in shapes.items():
            part = "mlp" if name in TARGETS[4:] else "self_attn"
            module = f"base_model.model.model.layers.{layer}.{part}.{name}"
            for factor, shape in (("lora_A", (rank, columns)), ("lora_B", (rows, rank))):
                tensors[f"{module}.{factor}.weight"] = (0.02 * random.standard_normal(shape)).astype(np.float32)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    about = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": TARGETS}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return folder


def peft_rates(base: Path, adapter: Path, tokens: int, runs: int) -> dict[str, list[float]]:
    import peft
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()
    rates: dict[str, list[float]] = {"peft, none": [], "peft, one": []}
    ids = torch.arange(16)[None]

    def rate(model: Any) -> float:
        start = time.perf_counter()
        model.generate(input_ids=ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
        return tokens / (time.perf_counter() - start)

    with torch.no_grad():
        adapted = peft.PeftModel.from_pretrained(model, adapter).eval()
        for _ in range(runs):
            with adapted.disable_adapter():
                rates["peft, none"].append(rate(adapted))
            rates["peft, one"].append(rate(adapted))
    return rates


def ratio_of(rates: dict[str, list[float]], one: str, other: str) -> str:
    if one not in rates:
        return ""
    return f"{statistics.median(a / b for a, b in zip(rates[one], rates[other], strict=True)):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantization")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--peft", action="store_true")
    parser.add_argument("--json", type=Path, help="a file for all runs' figures")
    arguments = parser.parse_args()
    folder = Path(tempfile.gettempdir())
    base = write_model(folder / "jaxinfer-llama-350m", LLAMA_350M)
    names = [f"a{i}" for i in range(COUNT)]
    adapters: Any = {
        name: write_adapter(folder / f"jaxinfer-adapter-{arguments.rank}-{i}", LLAMA_350M, arguments.rank, i)
        for i, name in enumerate(names)
    }
    options: Any = {"dtype": arguments.dtype, "quantization": arguments.quantization}
    params = SamplingParams(max_tokens=arguments.tokens, temperature=0, ignore_eos=True)
    cases: dict[str, list[str | None]] = {
        "1 row, none": [None],
        "1 row, one": ["a0"],
        "16 rows, none": [None] * 16,
        "16 rows, one": ["a0"] * 16,
        "16 rows, 8 adapters": names * 2,
        "16 rows, one of them with one": ["a0"] + [None] * 15,
    }
    rates: dict[str, list[float]] = {name: [] for name in cases}
    shares: dict[str, list[float]] = {name: [] for name in cases}  # of CPUs' time, which others at work change less
    with LLM(base, adapters=adapters, max_num_seqs=16, skip_tokenizer_init=True, **options) as llm:
        size = llm.model.nbytes - 2 * LLAMA_350M["vocab_size"] * LLAMA_350M["hidden_size"]  # looked up, not read
        each = sum(own.a.nbytes + own.b.nbytes for own in llm.engine.adapters.find("a0").factors.values())
        prompts = [np.random.default_rng(i).integers(0, 32000, 16).tolist() for i in range(16)]
        for run in range(arguments.runs + 1):
            for name, which in cases.items():
                start, busy = time.perf_counter(), time.process_time()
                llm.generate(prompts[: len(which)], params, adapter=which, use_tqdm=False)
                if run:  # the first one compiles
                    rates[name].append(len(which) * arguments.tokens / (time.perf_counter() - start))
                    shares[name].append(len(which) * arguments.tokens / (time.process_time() - busy))
    if arguments.peft:
        rates |= peft_rates(base, adapters["a0"], arguments.tokens, arguments.runs)
    table = Table("rows", "tokens/s", "of none", "by CPU time", "bound")
    for name, values in rates.items():
        none = name.split(",")[0] + ", none"
        ratio, busy = (ratio_of(all_of_them, name, none) for all_of_them in (rates, shares))
        read = len({own for own in cases.get(name, []) if own}) * each
        bound = f"{size / (size + read):.3f}" if name in cases else ""
        table.add_row(name, f"{statistics.median(values):.1f}", ratio, busy, bound)
    console = Console()
    console.print(f"{cpu_name()}, {options}, rank {arguments.rank}")
    console.print(table)
    if arguments.json is not None:
        about = {"cpu": cpu_name(), **options, "rank": arguments.rank, "tokens": arguments.tokens}
        about["bytes"] = {"base": size, "adapter": each}
        arguments.json.write_text(
            json.dumps(about | {"tokens_per_second": rates, "per_cpu_second": shares}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
