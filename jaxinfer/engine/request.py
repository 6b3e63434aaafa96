"""One request on its way through the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jaxinfer.sampling.params import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(eq=False)
class Request:
    """The state of one sequence, in integers: nothing here knows of a device.

    tokens holds prompt and output together, as far as the host knows them. Calls are scheduled before the tokens of
    the call before have arrived, so `length` counts those that are on their way too, and `computed` how many tokens
    will have their keys and values in the cache when all scheduled calls are done.
    limit is the most tokens that the sequence may reach; stop_ids end it.
    """

    id: int
    prompt_length: int
    tokens: list[int]
    params: SamplingParams
    seed: int
    stop_ids: tuple[int, ...]
    limit: int
    priority: int = 0  # lower runs earlier
    length: int = 0
    computed: int = 0
    decoding: bool = False  # its last token is in its slot on the device
    slot: int = -1  # its place in the device's arrays; -1 while it waits
    prepared: bool = False  # its slot has been made ready for its penalties and masks
    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)  # of its full pages
    published: int = 0  # how many of its pages others can find
    hits: int = 0  # tokens that the prefix cache had
    finish_reason: FinishReason | None = None
    preemptions: int = 0

    def __post_init__(self) -> None:
        self.length = len(self.tokens)

    @property
    def room(self) -> int:
        """How many more tokens may be sampled."""
        return self.limit - self.length

    @property
    def reads_prefix(self) -> bool:
        """Whether it may begin with pages that another request has computed: not if all of its prompt's logits, or a
        count of all its tokens, are wanted."""
        return self.params.prompt_logprobs is None and not self.params.has_penalties

    @property
    def output_token_ids(self) -> list[int]:
        return self.tokens[self.prompt_length :]
