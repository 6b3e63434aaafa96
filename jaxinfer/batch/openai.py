"""OpenAI's batch format."""

from __future__ import annotations

from typing import Any

from jaxinfer.batch.row import Row
from jaxinfer.engine.outputs import RequestOutput


def response_line(row: Row, output: RequestOutput | None, *, model: str) -> dict[str, Any]:
    """The line of an OpenAI row (`row.openai`). output None: only if the row has an error. model: its name."""
    raise NotImplementedError
