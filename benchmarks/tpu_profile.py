"""What decoding steps and prompts take on TPUs by the TPU compiler's own estimates, beside the roofline.

    python benchmarks/tpu_profile.py [--only NAME] [--json FILE]

The deployments are those of configs/, with as many sequences as rows are asked for. A program takes a
minute or two, and no TPU.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from jaxinfer.cli.profile_tables import print_profile
from jaxinfer.engine.deployment import read_deployment
from jaxinfer.plan.figures import context_of
from jaxinfer.plan.fit import fit_config
from jaxinfer.plan.profile import profile
from jaxinfer.plan.targets import find_target

CONFIGS = Path(__file__).parents[1] / "configs"
DEPLOYMENTS = "llama-3.1-8b_v5e-8", "llama-3.1-8b_v6e-1", "qwen3-30b-a3b_v6e-8", "gpt2_v5e-1"
# As many sequences as are run for, rows, tokens of prompts.
ASKED: tuple[tuple[int, list[int], list[int]], ...] = ((64, [1, 64], []), (256, [256], [2048]))


def profiles(name: str, most: int, rows: list[int], tokens: list[int]) -> dict[str, Any]:
    """Those of a deployment."""
    deployment = read_deployment(str(CONFIGS / f"{name}.yaml"))
    assert deployment.architecture is not None
    assert deployment.topology is not None
    options = {**deployment.options, "max_num_seqs": most}
    held = fit_config(deployment.architecture, find_target(deployment.topology), **options)
    context = context_of(held.programs.model.config, None, options)
    return profile(held, deployment.architecture, options, context, rows, tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=DEPLOYMENTS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    if arguments.json is not None and arguments.json.exists() and arguments.only is not None:
        found = json.loads(arguments.json.read_text())
    for name in [arguments.only] if arguments.only else DEPLOYMENTS:
        parts = [profiles(name, *asked) for asked in ASKED]
        found[name] = parts[0] | {"programs": [program for part in parts for program in part["programs"]]}
        print_profile(Console(), found[name], name)
        if arguments.json is not None:  # what there is, should the next one fail
            arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
