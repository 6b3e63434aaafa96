"""From a record to a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxinfer.batch.row import Record, Row, Task
from jaxinfer.sampling.params import SamplingParams


class Parser:
    """Understands records. `defaults`: where a row's parameters start from; `options`: what the job's user set over
    them (for OpenAI lines: over OpenAI's defaults). Raises ValueError for a bad template or bad options."""

    def __init__(
        self,
        task: Task,
        defaults: SamplingParams,
        options: Mapping[str, Any] | None = None,
        prompt_template: str | None = None,
    ): ...

    def parse(self, record: Record) -> Row:
        """The row; one that is no good has `error`, nothing is raised."""
        raise NotImplementedError
