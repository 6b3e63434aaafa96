"""What an engine counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass
class EngineStats:
    """Counts and times since loading.

    running, waiting: requests now.
    pages_used, pages_total: of the cache, now.
    prefix_caching: whether prompts that begin alike share pages.
    calls: of the device.
    prefill_tokens, prefill_seconds: of calls with chunks of prompts, without compilation; their decoding rows count,
        too.
    decode_tokens, decode_seconds: of all other calls, without compilation.
    step_seconds: of one decoding step, lately.
    queried_tokens: of prompts of requests that have ended.
    hit_tokens: how many of those were in the prefix cache.
    stateless_tokens: how many more of them were, but without a state to go on from, which some models need.
    snapshots_used, snapshots_total: such states that are kept now, and at most.
    preemptions: of requests that have ended.
    finished, aborted: requests that have ended so.
    max_adapters: that rows of one call may have; 0 where there are none. adapter_loads: how often one was put on the
        devices. adapter_reads: and how often one was read from its folder.
    running_adapters, waiting_adapters: requests now that have one, by its name.
    adapter_tokens: that were sampled with one, by its name, for requests that have ended.
    table_tokens: that were sampled by a grammar's table on the devices. table_loads: how often one was put there.
    """

    running: int = 0
    waiting: int = 0
    pages_used: int = 0
    pages_total: int = 0
    prefix_caching: bool = True
    calls: int = 0
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    step_seconds: float = 0.0
    queried_tokens: int = 0
    hit_tokens: int = 0
    stateless_tokens: int = 0
    snapshots_used: int = 0
    snapshots_total: int = 0
    preemptions: int = 0
    finished: int = 0
    aborted: int = 0
    max_adapters: int = 0
    adapter_loads: int = 0
    adapter_reads: int = 0
    table_tokens: int = 0
    table_loads: int = 0
    running_adapters: Mapping[str, int] = field(default_factory=dict)
    waiting_adapters: Mapping[str, int] = field(default_factory=dict)
    adapter_tokens: Mapping[str, int] = field(default_factory=dict)

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def hit_rate(self) -> float:
        return self.hit_tokens / self.queried_tokens if self.queried_tokens else 0.0
