"""A program that is compiled in a process of its own, where libtpu writes down what it makes.

Its flags are read when it starts, and a kernel that it has no layout for may end the whole process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxinfer.compile_cache import without_compile_cache
from jaxinfer.engine.config import EngineConfig
from jaxinfer.engine.programs import Key
from jaxinfer.plan.bundles import Code, read_bundles
from jaxinfer.plan.fit import fit_config
from jaxinfer.plan.targets import find_target

TEXT = "program.hlo"
WRITTEN = ".*(final_(bundles|hlo-static)|deduplication-map).*"  # of some eighty texts of each fusion


@dataclass(frozen=True)
class Dumped:
    """text: of the compiled program. codes: of its instructions; none where libtpu has written none."""

    text: str
    codes: Mapping[str, Code]


def dumped(config: Mapping[str, Any], topology: str, options: EngineConfig, key: Key) -> Dumped:
    """An engine's program for a slice, compiled. Raises ValueError with the compiler's last words."""
    with tempfile.TemporaryDirectory(prefix="jaxinfer-profile-") as name:
        folder = Path(name)
        flags = (
            f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex={WRITTEN} "
            f"--xla_mosaic_dump_to={folder / 'mosaic'}"
        )
        asked = {"config": dict(config), "topology": topology, "options": dict(options), "key": key}
        given = os.environ.get("LIBTPU_INIT_ARGS", "")
        path = os.pathsep.join(entry for entry in sys.path if entry)
        own = {"JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": f"{given} {flags}".strip(), "PYTHONPATH": path}
        ended = subprocess.run(
            [sys.executable, "-P", "-m", "jaxinfer.plan.dumped", str(folder)],
            input=json.dumps(asked, default=str).encode(),
            env=os.environ | own,
            capture_output=True,
        )
        if ended.returncode or not (folder / TEXT).exists():
            words = [line for line in ended.stderr.decode(errors="replace").splitlines() if line.strip()]
            reason = words[-1] if words else f"its process ended with {ended.returncode}"
            raise ValueError(
                f"profile of {key[0]}, {key[1]}, for {topology}: the TPU compiler did not make it: {reason}"
            )
        return Dumped((folder / TEXT).read_text(), read_bundles(folder))


def main(folder: Path) -> None:
    """What the process does. What is asked comes on its standard input."""
    asked = json.load(sys.stdin)
    options, key = asked["options"], tuple(asked["key"])
    target = find_target(asked["topology"])
    held = fit_config(asked["config"], target, **options)
    with without_compile_cache():
        text = held.programs[key].lower().compile().as_text()
    assert text is not None
    (folder / TEXT).write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
