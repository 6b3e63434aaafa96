"""Memory does not depend on the number of rows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "batch_rows.py"


@pytest.mark.slow
@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_memory_is_flat(format):
    """A part of what benchmarks/batch_rows.py does with a million rows."""
    command = [sys.executable, SCRIPT, "--rows", "60000", "--format", format, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout)
    assert figures["rows"] == 60_000
    assert figures["most_growth_mb"] < 50
