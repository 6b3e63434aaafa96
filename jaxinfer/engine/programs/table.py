"""All programs that an engine can need: a finite table, known before the first request."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jaxinfer.engine.programs.base import EngineShapes, Key, Program, adapted_kind
from jaxinfer.engine.programs.copy import Copy
from jaxinfer.engine.programs.decode import Decode, DecodeForward, FullDecode
from jaxinfer.engine.programs.forward import Forward
from jaxinfer.engine.programs.sample import FullSample, GuidedSample, Sample
from jaxinfer.engine.programs.score import Score
from jaxinfer.engine.programs.slots import (
    LoadAdapter,
    LoadScaledAdapter,
    LoadTable,
    PrepareCounts,
    PrepareMasks,
    PreparePlaces,
    Zeros,
)


@dataclass(frozen=True)
class Programs(EngineShapes):
    """By key. A mixed call is a forward, and sample or score or both after it; where all rows decode it is a decode."""

    @cached_property
    def table(self) -> dict[Key, Program[Any]]:
        programs = [
            *(Decode(self, rows) for rows in self.buckets.decode),
            *(Forward(self, tokens) for tokens in self.buckets.tokens),
            *(Sample(self, rows) for rows in self.buckets.sample),
            *(FullDecode(self, rows) for rows in self.buckets.full_decode),
            *(FullSample(self, rows) for rows in self.buckets.sample),
            *(DecodeForward(self, rows) for rows in self.buckets.full_decode),
            *(GuidedSample(self, rows) for rows in self.buckets.sample),
            Score(self, self.max_tokens),
            PrepareMasks(self),
            PrepareCounts(self),
            PreparePlaces(self),
            LoadTable(self),
            Zeros(self),
            *([Copy(self, self.max_rows)] if self.snapshots else []),
        ]
        if self.adapter_limits.slots:
            programs += [
                *(Decode(self, rows, adapted=True) for rows in self.buckets.decode),
                *(Forward(self, tokens, adapted=True) for tokens in self.buckets.tokens),
                *(FullDecode(self, rows, adapted=True) for rows in self.buckets.full_decode),
                *(DecodeForward(self, rows, adapted=True) for rows in self.buckets.full_decode),
                *(self._adapted_vocabulary if self.adapter_limits.vocabulary else ()),
                LoadAdapter(self),
                LoadScaledAdapter(self),
            ]
        return {program.key: program for program in programs}

    @property
    def _adapted_vocabulary(self) -> list[Program[Any]]:
        sizes = self.buckets.sample
        kinds = Sample, FullSample, GuidedSample
        return [
            *(kind(self, rows, adapted=True) for kind in kinds for rows in sizes),
            Score(self, self.max_tokens, adapted=True),
        ]

    @property
    def largest(self) -> list[Key]:
        """Of those that need most memory."""
        tokens, rows = self.max_tokens, self.max_rows
        keys = [(FullDecode.kind, rows), (Forward.kind, tokens), (FullSample.kind, rows), (Score.kind, tokens)]
        with_adapters = [(adapted_kind(kind), size) for kind, size in keys]
        return [own if own in self.table else key for own, key in zip(with_adapters, keys, strict=True)]
