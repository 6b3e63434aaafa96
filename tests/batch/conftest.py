"""The packaged model, with few programs to compile, and files of rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from jaxinfer import LLM
from jaxinfer.demo import MODEL_DIR


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
