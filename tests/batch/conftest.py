"""The packaged model, with few programs to compile, and files of rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from jaxinfer import LLM
from jaxinfer.batch import run
from jaxinfer.demo import MODEL_DIR

QUESTIONS = [{"prompt": f"What is {i} + {i + 7}?", "id": i} for i in range(25)]
SHORT = {"max_tokens": 6}


@pytest.fixture(scope="session")
def demo():
    with LLM(MODEL_DIR, max_num_seqs=4, max_num_batched_tokens=32) as llm:
        yield llm


@pytest.fixture
def rows_file(tmp_path: Path) -> Callable[[Iterable[Any]], Path]:
    """Writes rows (bytes as they are) to a JSON Lines file."""

    def write(rows: Iterable[Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows))
        return path

    return write


def read_rows(output: Path) -> list[dict[str, Any]]:
    """All rows of an output, a folder or a file."""
    files = [output] if output.is_file() else sorted(output.glob("part-*.*"))
    if files[0].suffix == ".parquet":
        import pyarrow.parquet as pq

        return [row for file in files for row in pq.read_table(file).to_pylist()]
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.fixture
def job(demo, tmp_path):
    """Runs a job of ten rows a part; returns what it says."""

    def start(source, output="out", **options):
        options = {"model": demo, "sampling_params": SHORT, "rows_per_part": 10} | options
        return run(source, tmp_path / output, **options)

    return start


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("part-*"))}


def after_a_part() -> Callable[[], bool]:
    """For `stop`: ends a job when the part is written that is the next one."""
    asked = iter([False])
    return lambda: next(asked, True)
