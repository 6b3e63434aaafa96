"""Memory does not depend on the number of rows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "batch_rows.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "format", "rows", "kills"),
    [("generate", "jsonl", 60_000, 0), ("generate", "parquet", 60_000, 0), ("embed", "parquet", 30_000, 2)],
)
def test_memory_is_flat(task, format, rows, kills):
    """A part of what benchmarks/batch_rows.py does with a million rows."""
    command = [sys.executable, SCRIPT, "--task", task, "--format", format, "--json"]
    command += ["--rows", str(rows), "--kills", str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout)
    assert figures["rows"] == rows
    assert figures["most_growth_mb"] < 50
    assert figures.get("same", True)
