"""One request on its way through the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jaxinfer.sampling.params import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(eq=False)
class Request:
    """The state of one sequence, in integers: nothing here knows of a device.

    tokens holds prompt and output together; the keys and values of the first `computed` of them are in the cache.
    limit is the most tokens that the sequence may reach; stop_ids end it.
    """

    id: int
    prompt_length: int
    tokens: list[int]
    params: SamplingParams
    seed: int
    stop_ids: tuple[int, ...]
    limit: int
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    preemptions: int = 0

    @property
    def pending(self) -> int:
        """Tokens whose keys and values are not in the cache yet; 1 for a decoding row."""
        return len(self.tokens) - self.computed

    @property
    def room(self) -> int:
        """How many more tokens may be sampled."""
        return self.limit - len(self.tokens)

    @property
    def output_token_ids(self) -> list[int]:
        return self.tokens[self.prompt_length :]
