"""How far a job is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxinfer.batch.manifest import Manifest
from jaxinfer.batch.parts import Output


@dataclass(frozen=True)
class Summary:
    """What is there of an output, or of this shard of it, and how this run went.

    output: the file or folder.
    complete, rows, errors, prompt_tokens, generated_tokens: of all of it, whichever run made it.
    rows_now: those of this run.
    seconds: of this run, without loading.
    tokens_per_second: generated ones; when scoring, read ones.
    device_share: how much of the time the device worked.
    cache_hit_rate: how many of the prompts' tokens the prefix cache had.
    """

    output: str
    complete: bool
    rows: int
    errors: int
    prompt_tokens: int
    generated_tokens: int
    rows_now: int = 0
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    device_share: float = 0.0
    cache_hit_rate: float = 0.0

    @classmethod
    def of(cls, output: Output, manifest: Manifest, **this_run: Any) -> Summary:
        counts = {name: getattr(manifest, name) for name in ("rows", "errors", "prompt_tokens", "generated_tokens")}
        return cls(output.name, manifest.complete, **counts, **this_run)
