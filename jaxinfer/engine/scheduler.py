"""Who runs in the next device call: plain Python over integers, tested without a device.

Continuous batching: rows join and leave at every call. Decoding rows go first, one token each; what is left of the
token budget goes to prompts, in chunks, first come, first served. When pages run out, the youngest request gives
its pages back and is computed again later; its tokens so far are kept, so the output is the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from jaxinfer.engine.pages import PageAllocator
from jaxinfer.engine.request import Request


@dataclass
class Schedule:
    """One device call. Either every row decodes `steps` tokens (no chunks), or each decoding row decodes one
    token beside chunks of prompts: (request, number of its pending tokens)."""

    decode: list[Request] = field(default_factory=list)
    chunks: list[tuple[Request, int]] = field(default_factory=list)
    steps: int = 1

    @property
    def requests(self) -> list[Request]:
        """All rows, decoding rows first."""
        return [*self.decode, *(request for request, _ in self.chunks)]


class Scheduler:
    """Holds waiting and running requests. `max_tokens` is the token budget of a call, `max_rows` its rows."""

    def __init__(self, pages: PageAllocator, max_rows: int, max_tokens: int):
        if max_tokens < max_rows:
            raise ValueError(f"max_num_batched_tokens is {max_tokens}: it must be at least max_num_seqs, {max_rows}")
        self.pages = pages
        self.max_rows = max_rows
        self.max_tokens = max_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # oldest first

    def add(self, request: Request) -> None:
        """Queues a request. Raises ValueError if it could never run, even alone."""
        needed = self.pages.pages_for(request.limit)
        if needed > self.pages.num_pages - 1:
            raise ValueError(
                f"a sequence of up to {request.limit} tokens needs {needed} pages of the cache, which has "
                f"{self.pages.num_pages - 1}; lower max_tokens or raise kv_cache_memory"
            )
        self.waiting.append(request)

    def schedule(self, max_steps: int) -> Schedule:
        """The next call; at most `max_steps` tokens a decoding row. Empty if there is nothing to do."""
        schedule = Schedule()
        for request in list(self.running):
            # The youngest gives way, so none that has its place here loses it; who gave way has all tokens pending.
            if request.pending == 1 and self._reserve(request, len(request.tokens)):
                schedule.decode.append(request)
        budget = self.max_tokens - len(schedule.decode)
        for request in self.running:
            if request.pending > 1 and budget > 0:
                budget -= self._chunk(schedule, request, budget)
        while self.waiting and budget > 0 and len(self.running) < self.max_rows:
            request = self.waiting[0]
            # All of the prompt or nothing: a half-placed prompt would hold pages that the others need to finish.
            if not self.pages.grow(request.pages, len(request.tokens)):
                break
            self.running.append(self.waiting.popleft())
            budget -= self._chunk(schedule, request, budget)
        if schedule.decode and not schedule.chunks:
            schedule.steps = self._steps(schedule.decode, max_steps)
        return schedule

    def finish(self, request: Request) -> None:
        """Removes a request, running or waiting, and takes its pages back."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self.pages.release(request.pages)

    def restart(self, requests: Iterable[Request]) -> None:
        """Begins anew with these requests and an empty cache, after a call that was broken off in the middle.

        Their tokens so far are kept, so their outputs are the same.
        """
        self.pages.reset()
        self.running, self.waiting = [], deque(requests)
        for request in self.waiting:
            request.pages.clear()
            request.computed = 0

    def _chunk(self, schedule: Schedule, request: Request, budget: int) -> int:
        count = min(budget, request.pending)
        schedule.chunks.append((request, count))
        return count

    def _reserve(self, request: Request, tokens: int) -> bool:
        """Pages for a running request, at the cost of the youngest if need be; False if that was itself."""
        while not self.pages.grow(request.pages, tokens):
            youngest = self.running.pop()
            self.pages.release(youngest.pages)
            youngest.computed = 0
            youngest.preemptions += 1
            self.waiting.appendleft(youngest)
            if youngest is request:
                return False
        return True

    def _steps(self, decode: list[Request], max_steps: int) -> int:
        """As many steps as are wanted and as there are pages for. Somebody waiting gets the first row that ends."""
        rooms = [request.room for request in decode]
        steps = max(1, min(max_steps, min(rooms) if self.waiting else max(rooms)))
        while steps > 1:
            wanted = [(r, len(r.tokens) + min(steps, r.room) - 1) for r in decode]
            missing = sum(max(0, self.pages.pages_for(n) - len(r.pages)) for r, n in wanted)
            if missing <= self.pages.free_count:
                for request, tokens in wanted:
                    self.pages.grow(request.pages, tokens)
                return steps
            steps //= 2
        return 1
