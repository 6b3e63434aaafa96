"""Several schedulers in step: one for each shard of rows, with slots, pages and a prefix cache of its own.

Who waits is dealt out anew before each call, in order, each to the shard with the fewest sequences. All shards make the
same kind of call, with the same number of steps.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

from jaxinfer.engine.adapters import AdapterSlots
from jaxinfer.engine.request import Request
from jaxinfer.engine.scheduler import Scheduler, SchedulerOutput
from jaxinfer.engine.table_blocks import TableBlocks


class DataParallelScheduler:
    """Schedules for all shards of rows. There is at least one."""

    def __init__(self, shards: Sequence[Scheduler]):
        self.shards = tuple(shards)
        self._waiting: list[tuple[int, int, Request]] = []  # not dealt out yet; with one shard, nobody

    @property
    def adapters(self) -> AdapterSlots:
        """Those of all shards."""
        return self.shards[0].adapters

    @property
    def tables(self) -> list[TableBlocks]:
        """Those of each shard."""
        return [shard.tables for shard in self.shards]

    @property
    def running(self) -> list[Request]:
        return [request for shard in self.shards for request in shard.running]

    @property
    def waiting_count(self) -> int:
        return len(self._waiting) + sum(shard.waiting_count for shard in self.shards)

    @property
    def max_rows(self) -> int:
        return sum(shard.max_rows for shard in self.shards)

    @property
    def pages_total(self) -> int:
        return sum(shard.cache.pages_total for shard in self.shards)

    @property
    def pages_used(self) -> int:
        return sum(shard.cache.pages_used for shard in self.shards)

    @property
    def snapshots_total(self) -> int:
        return sum(len(shard.cache.states.slots) for shard in self.shards if shard.cache.states)

    @property
    def snapshots_used(self) -> int:
        return sum(shard.cache.states.used for shard in self.shards if shard.cache.states)

    @property
    def prefix_caching(self) -> bool:
        return self.shards[0].cache.prefix_caching

    @property
    def idle(self) -> bool:
        """Whether there is nothing to run."""
        return not self._waiting and all(shard.idle for shard in self.shards)

    def check(self, limit: int) -> None:
        """Raises ValueError if a sequence of up to `limit` tokens could never run, even alone."""
        self.shards[0].check(limit)

    def add(self, request: Request) -> None:
        """Queues a request. Raises ValueError if it could never run, even alone."""
        self.check(request.limit)
        self._queue(request)

    def schedule(self, max_steps: int, may_preempt: bool = True) -> list[SchedulerOutput]:
        """The next call, as each shard sees it. All are empty if there is nothing to do."""
        if len(self.shards) == 1:
            return [self.shards[0].schedule(max_steps, may_preempt)]
        self._deal()
        schedules = [shard.decoding(may_preempt) for shard in self.shards]
        if any(schedule.out_of_pages for schedule in schedules):
            return [SchedulerOutput(out_of_pages=True) for _ in self.shards]
        both = list(zip(self.shards, schedules, strict=True))
        for shard, schedule in both:
            shard.fill(schedule)
        steps = 1
        if not any(schedule.chunks for schedule in schedules):
            steps = min((shard.steps(s, max_steps) for shard, s in both if s.decode), default=1)
        for shard, schedule in both:
            shard.advance(schedule, steps)
        return schedules

    def publish(self, request: Request, computed: int) -> None:
        """Lets others of its shard find the full pages among the first `computed` tokens of a running request."""
        self.shards[request.shard].publish(request, computed)

    def finish(self, request: Request) -> None:
        """Removes a request, running or waiting, and takes its pages back."""
        if any(entry[-1] is request for entry in self._waiting):
            self._waiting = [entry for entry in self._waiting if entry[-1] is not request]
            heapq.heapify(self._waiting)
        else:
            self.shards[request.shard].finish(request)

    def restart(self, requests: Iterable[Request]) -> None:
        """Begins anew with these requests and empty caches."""
        self._waiting.clear()
        for shard in self.shards:
            shard.restart([])
        for request in requests:
            request.pages, request.capacity, request.cuts = [], 0, []
            request.slot = request.adapter_slot = -1
            request.table = None
            self._queue(request)

    def _queue(self, request: Request) -> None:
        if len(self.shards) == 1:
            self.shards[0].queue(request)
        else:
            heapq.heappush(self._waiting, (request.priority, request.id, request))

    def _deal(self) -> None:
        """Gives each shard as many of those who wait as it has rows for, and one more, so that it knows of others."""
        for shard in self.shards:
            for request in shard.take_waiting():
                self._queue(request)
        load = [(len(shard.running), i) for i, shard in enumerate(self.shards)]
        heapq.heapify(load)
        while self._waiting and load[0][0] <= self.shards[load[0][1]].max_rows:
            count, i = load[0]
            *_, request = heapq.heappop(self._waiting)
            request.shard = i
            self.shards[i].queue(request)
            heapq.heapreplace(load, (count + 1, i))
