"""Who runs in the next device call: plain Python over integers, tested without a device.

Continuous batching: rows join and leave at every call. Decoding rows go first, one token each; what is left of the
token budget goes to prompts, in chunks, by priority, then first come, first served. Chunks end where a state is to be
kept. When pages run out, the youngest request gives its pages back and is computed again later; its tokens so far are
kept, so the output is the same.

`advance` counts what a call will have done before it has: what is scheduled will be run, in order. So the next call
may be asked for before the tokens of the last one are known (`Request.length` counts them already), and `restart` takes
the promise back.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field

from jaxinfer.engine.adapters import AdapterSlots
from jaxinfer.engine.kv_cache import Copies, KVCacheManager
from jaxinfer.engine.request import Request
from jaxinfer.engine.table_blocks import TableBlocks


@dataclass
class SchedulerOutput:
    """One device call. Either every row decodes up to `steps` tokens (no chunks), or each decoding row decodes one
    token beside chunks of prompts.

    decode: the decoding rows.
    chunks: (request, number of its next tokens).
    steps: most tokens of a decoding row.
    start: tokens of each row in the cache before the call, in the order of `requests`.
    samples: tokens that each row samples, unless it stops earlier; 0 for an inner chunk of a prompt.
    copies: of pages and states, that are made before the call.
    out_of_pages: some are missing and `may_preempt` was not given: nothing is to be run before it is, or the oldest
        would wait for the youngest.
    """

    decode: list[Request] = field(default_factory=list)
    chunks: list[tuple[Request, int]] = field(default_factory=list)
    steps: int = 1
    start: list[int] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    copies: Copies = field(default_factory=list)
    out_of_pages: bool = False

    @property
    def requests(self) -> list[Request]:
        """All rows, decoding rows first."""
        return [*self.decode, *(request for request, _ in self.chunks)]

    @property
    def counts(self) -> list[int]:
        """Tokens of each row in a call with chunks."""
        return [1] * len(self.decode) + [count for _, count in self.chunks]


class Scheduler:
    """Holds waiting and running requests. `max_tokens` is the token budget of a call, `max_rows` its rows."""

    def __init__(self, cache: KVCacheManager, max_rows: int, max_tokens: int, adapters: AdapterSlots | None = None):
        if max_tokens < max_rows:
            raise ValueError(f"max_num_batched_tokens is {max_tokens}: it must be at least max_num_seqs, {max_rows}")
        self.cache = cache
        self.adapters = adapters or AdapterSlots(0)
        self.tables = TableBlocks()
        self.max_rows = max_rows
        self.max_tokens = max_tokens
        self.running: list[Request] = []  # oldest first
        self._free_slots: list[int] = []
        self._waiting: list[tuple[int, int, Request]] = []
        self._aside: list[tuple[int, int, Request]] = []  # of those that wait: no slot is free for their adapters
        self.restart([])

    @property
    def waiting_count(self) -> int:
        return len(self._waiting) + len(self._aside)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to run."""
        return not self.running and not self.waiting_count

    def add(self, request: Request) -> None:
        """Queues a request. Raises ValueError if it could never run, even alone."""
        self.check(request.limit)
        self.queue(request)

    def check(self, limit: int) -> None:
        """Raises ValueError if a sequence of up to `limit` tokens could never run, even alone."""
        self.cache.check(limit)

    def schedule(self, max_steps: int, may_preempt: bool = True) -> SchedulerOutput:
        """The next call; at most `max_steps` tokens a decoding row. Empty if there is nothing to do."""
        schedule = self.decoding(may_preempt)
        if not schedule.out_of_pages:
            self.fill(schedule)
            self.advance(schedule, self.steps(schedule, max_steps))
        return schedule

    def decoding(self, may_preempt: bool) -> SchedulerOutput:
        """The rows that decode, with pages for a token each; those whose prompts are not computed yet have theirs for a
        chunk, for as many as fell out of windows."""
        schedule = SchedulerOutput()
        for request in list(self.running):
            if request.slot < 0 or (request.decoding and not request.room):
                continue
            if request.length > request.capacity and not self._reserve(request, request.length, may_preempt):
                schedule.out_of_pages |= not may_preempt
            elif request.decoding:
                schedule.decode.append(request)
        schedule.decode = [r for r in schedule.decode if r.slot >= 0]  # a later one may have preempted it
        return SchedulerOutput(out_of_pages=True) if schedule.out_of_pages else schedule

    def fill(self, schedule: SchedulerOutput) -> None:
        """Adds chunks of prompts, as far as tokens, rows and pages go."""
        budget = self.max_tokens - len(schedule.decode)
        for request in self.running:
            if not request.decoding and budget > 0:
                budget -= self._chunk(schedule, request, budget)
        if self._aside and self.adapters.has_room(self._aside[0][-1]):
            self._aside_again()
        while self._waiting and budget > 0 and len(self.running) < self.max_rows:
            entry = self._waiting[0]
            request = entry[-1]
            # Nobody with an adapter overtakes those aside: slots become free in the end.
            overtakes = bool(self._aside) and self._aside[0] < entry
            if request.adapter is not None and (overtakes or not self.adapters.hold(request)):
                heapq.heappush(self._aside, heapq.heappop(self._waiting))
                continue
            if not self._admit(request):
                self.adapters.release(request)
                break
            heapq.heappop(self._waiting)
            budget -= self._chunk(schedule, request, budget)

    def _aside_again(self) -> None:
        """Those aside wait like all others."""
        self._waiting += self._aside
        self._aside = []
        heapq.heapify(self._waiting)

    def publish(self, request: Request, computed: int) -> None:
        """Lets others find the full pages among the first `computed` tokens of a running request."""
        self.cache.publish(request, computed)

    def finish(self, request: Request) -> None:
        """Removes a request, running or waiting, and takes its pages back. What it has computed others can go on from,
        if that is known: not where calls on their way go beyond it."""
        if request.slot >= 0:
            if request.decoding and request.target is None and request.length == len(request.tokens):
                self.cache.keep(request, request.length - 1)
            self.running.remove(request)
            self._leave(request)
        else:
            self._aside_again()
            self._waiting = [entry for entry in self._waiting if entry[-1] is not request]
            heapq.heapify(self._waiting)

    def queue(self, request: Request) -> None:
        """`add` without the check."""
        request.computed, request.published, request.length = 0, 0, len(request.tokens)
        request.decoding = request.prepared = False
        heapq.heappush(self._waiting, (request.priority, request.id, request))

    def take_waiting(self) -> list[Request]:
        """Those that wait, who are then no longer queued."""
        self._aside_again()
        waiting, self._waiting = self._waiting, []
        return [request for *_, request in waiting]

    def restart(self, requests: Iterable[Request]) -> None:
        """Begins anew with these requests and an empty cache, after a call that was broken off in the middle.

        Their tokens so far are kept, so their outputs are the same.
        """
        self.cache.reset()
        self.adapters.reset()
        self.tables.reset()
        self.running, self._waiting, self._aside = [], [], []
        self._free_slots = list(range(self.max_rows - 1, -1, -1))
        for request in requests:
            request.pages, request.capacity, request.cuts = [], 0, []
            request.slot = request.adapter_slot = -1
            request.table = None
            self.queue(request)

    def _admit(self, request: Request) -> bool:
        """Gives a waiting request a slot and pages for all of its tokens, or nothing: a half-placed prompt would hold
        pages that others need to finish."""
        # Who was preempted leaves a page for each row that runs, or it would be preempted again at once, and again.
        spare = len(self.running) if request.preemptions else 0
        if not self.cache.allocate(request, spare, self._free_slots[-1]):
            return False
        request.slot = self._free_slots.pop()
        self.tables.hold(request)
        self.running.append(request)
        return True

    def _chunk(self, schedule: SchedulerOutput, request: Request, budget: int) -> int:
        end = request.cuts[0] if request.cuts else request.length
        count = min(budget, end - request.computed, self.cache.room(request.computed))
        if count > 0:
            schedule.chunks.append((request, count))
            # Even those admitted to the same call find it: a layer writes all rows' keys before any row looks.
            self.publish(request, request.computed + count)
        return max(count, 0)

    def advance(self, schedule: SchedulerOutput, steps: int) -> None:
        """Counts what the call will have done."""
        schedule.steps = steps
        rows = schedule.requests
        if rows:  # what they leave is copied before the call after this one
            schedule.copies = self.cache.take_copies()
        schedule.start = [request.computed for request in rows]
        counts = schedule.counts
        for i, request in enumerate(rows):
            if i < len(schedule.decode):
                samples = min(schedule.steps, request.room)
                request.computed += samples
            else:
                request.computed += counts[i]
                self.cache.reach_cut(request)
                request.decoding = request.computed == request.length
                samples = int(request.decoding and request.room > 0)
            request.length += samples
            schedule.samples.append(samples)

    def _reserve(self, request: Request, tokens: int, may_preempt: bool) -> bool:
        """Pages for a running request, at the cost of the youngest if need be; False if that was itself."""
        while not self.cache.reserve([(request, tokens)]):
            if not may_preempt:
                return False
            youngest = max(self.running, key=lambda r: (r.priority, r.id))
            self.running.remove(youngest)
            self._leave(youngest)
            youngest.preemptions += 1
            self.queue(youngest)
            if youngest is request:
                return False
        return True

    def _leave(self, request: Request) -> None:
        self.cache.release(request)
        self.adapters.release(request)
        self.tables.release(request)
        self._free_slots.append(request.slot)
        request.slot = -1

    def steps(self, schedule: SchedulerOutput, max_steps: int) -> int:
        """As many steps as are wanted and as there are pages for. Somebody waiting gets the first row that ends."""
        decode = schedule.decode
        if schedule.chunks or not decode:
            return 1
        rooms = [request.most_left for request in decode]
        most = min(max_steps, min(rooms) if self.waiting_count else max(rooms))
        steps = max(1, min(most, *(self.cache.room(request.computed) for request in decode)))
        while steps > 1:
            wanted = [(r, r.length + min(steps, r.room) - 1) for r in decode]
            if self.cache.reserve(wanted):
                return steps
            steps //= 2
        return 1
