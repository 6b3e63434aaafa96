"""Batch jobs over files of rows: read lazily, run through a model, and written so that a killed job can go on."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxinfer.batch.job import run
    from jaxinfer.batch.join import merge
    from jaxinfer.batch.summary import Summary
    from jaxinfer.batch.writer import TooManyErrors

_HOME = {"run": "job", "Summary": "summary", "merge": "join", "TooManyErrors": "writer"}

__all__ = ["Summary", "TooManyErrors", "merge", "run"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'jaxinfer.batch' has no attribute {name!r}")
    return getattr(importlib.import_module(f"jaxinfer.batch.{_HOME[name]}"), name)
