"""What programs cost by the TPU compiler's own account, kept in cycles.json by libtpu's version.

python -m tests.plan.gate    # writes what they cost now, for the version that is installed
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from jaxinfer.plan.fit import fit_config
from jaxinfer.plan.profile import profile
from jaxinfer.plan.targets import find_target

FILE = Path(__file__).with_name("cycles.json")
CONFIGS = Path(__file__).parents[2] / "configs"
# Deployments, rows that decode and are there at most, and tokens of prompts.
PROGRAMS: dict[str, tuple[list[int], list[int]]] = {
    "llama-3.1-8b_v5e-8": ([64], [512]),
    "gpt2_v5e-1": ([64], []),
}
MORE = 1.03  # times what an operation may cost
LEAST = 1000  # cycles or bundles by which it is more
Costs = dict[str, dict[str, dict[str, int]]]  # by program and operation: its cycles, its bundles


def costs(name: str) -> Costs:
    """Of a deployment's programs, compiled now."""
    fields = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    rows, tokens = PROGRAMS[name]
    config, target = fields.pop("architecture"), find_target(fields.pop("topology"))
    options = {key: own for key, own in fields.items() if key != "model"} | {"max_num_seqs": max(rows)}
    held = fit_config(config, target, **options)
    figures = profile(held, config, options, 1024, rows, tokens)
    return {f"{name}, {program['program']}": of_ops(program["ops"]) for program in figures["programs"]}


def of_ops(ops: list[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    return {op["op"]: {"cycles": op["cycles"], "bundles": op["bundles"]} for op in ops}


def worse(now: Costs, before: Costs) -> list[str]:
    """A line for each operation that costs more than MORE times what it did, or is new."""
    lines = []
    for program, ops in now.items():
        for op, own in ops.items():
            kept = before[program].get(op, {"cycles": 0, "bundles": 0})
            lines += [
                f"{program}: {op}: {own[unit]:,} {unit}, where it had {kept[unit]:,}"
                for unit in ("cycles", "bundles")
                if own[unit] > max(MORE * kept[unit], kept[unit] + LEAST)
            ]
    return lines


def main() -> None:
    kept = json.loads(FILE.read_text()) if FILE.exists() else {}
    kept[version("libtpu")] = {program: ops for name in PROGRAMS for program, ops in costs(name).items()}
    FILE.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
