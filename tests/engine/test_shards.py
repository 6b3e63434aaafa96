"""Several shards of rows in step: nobody lost, nobody in two places, all of the same kind of call."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.engine.request import Request
from jaxinfer.engine.shards import DataParallelScheduler
from tests.engine.device import make, most_pages, pages_of, request
from tests.engine.operations import sequences

OPERATIONS = sequences(
    st.tuples(st.just("add"), st.integers(1, 8), st.integers(1, 20), st.integers(0, 2)),
    st.tuples(st.just("add"), st.integers(1, 20), st.integers(1, 12), st.integers(0, 2)),
    st.tuples(st.just("add"), st.just(3), st.just(16), st.just(0)),
    min_size=20,
)


class Devices:
    """As many tables of who is where; a row's tokens are its number."""

    def __init__(self, count: int, **sizes: int):
        self.scheduler = DataParallelScheduler([make(**sizes) for _ in range(count)])
        self.live: list[Request] = []
        self.in_flight: list[list] = []
        self.count = 0
        self.seen: Counter[str] = Counter()

    def add(self, prompt: int, new: int, priority: int) -> None:
        added = request(self.count, prompt, new, priority)
        shard = self.scheduler.shards[0]
        if sum(most_pages(shard, added.limit)) <= shard.cache.pages_total:
            self.scheduler.add(added)
            self.live.append(added)
            self.count += 1

    def launch(self, max_steps: int) -> bool:
        if len(self.in_flight) == 2:
            self.take()
        preempted = {r.id: r.preemptions for r in self.live}
        schedules = self.scheduler.schedule(max_steps, may_preempt=not self.in_flight)
        rows = [r for schedule in schedules for r in schedule.requests]
        assert len({r.id for r in rows}) == len(rows)
        assert len({s.steps for s in schedules}) == 1
        for i, (shard, schedule) in enumerate(zip(self.scheduler.shards, schedules, strict=True)):
            assert all(r.shard == i and r in shard.running for r in schedule.requests)
            assert len(schedule.requests) <= shard.max_rows
            assert sum(schedule.counts) <= shard.max_tokens
            assert schedule.steps == 1 or not any(s.chunks for s in schedules)
        self.seen["all shards"] += all(s.requests for s in schedules)
        self.seen["preemptions"] += sum(r.preemptions > preempted[r.id] for r in self.live)
        self.check()
        if rows:
            self.in_flight.append(schedules)
        elif self.live and not self.in_flight:
            raise AssertionError("nothing runs, and there is something to do")
        return bool(rows)

    def take(self) -> None:
        if not self.in_flight:
            return
        for schedule in self.in_flight.pop(0):
            for each, samples in zip(schedule.requests, schedule.samples, strict=True):
                if each not in self.live or not samples:
                    continue
                each.tokens += [each.id] * samples
                assert len(each.tokens) <= each.limit
                self.scheduler.publish(each, len(each.tokens) - 1)
                if len(each.tokens) == each.limit:
                    self.end(each)
        self.check()

    def abort(self, which: int) -> None:
        if self.live:
            self.end(self.live[which % len(self.live)])
            self.check()

    def end(self, each: Request) -> None:
        self.scheduler.finish(each)
        self.live.remove(each)

    def restart(self) -> None:
        self.in_flight.clear()
        self.scheduler.restart(self.live)
        self.check()

    def check(self) -> None:
        scheduler = self.scheduler
        assert len(scheduler.running) + scheduler.waiting_count == len(self.live)
        assert {r.id for r in scheduler.running} <= {r.id for r in self.live}
        for i, shard in enumerate(scheduler.shards):
            held = {page for r in shard.running for page in pages_of(r)}
            assert shard.cache.pages_used == len(held)
            assert all(r.shard == i for r in shard.running)
        assert scheduler.idle == (not self.live)


def test_any_sequence_of_events():
    seen: Counter[str] = Counter()

    @settings(max_examples=400, deadline=None, derandomize=True, database=None)
    @given(
        count=st.integers(1, 4),
        num_pages=st.integers(6, 12),
        page_size=st.integers(2, 4),
        max_rows=st.integers(2, 4),
        more_tokens=st.integers(0, 12),
        operations=OPERATIONS,
    )
    def run(count, num_pages, page_size, max_rows, more_tokens, operations):
        sizes = {"num_pages": num_pages, "page_size": page_size, "max_rows": max_rows}
        devices = Devices(count, max_tokens=max_rows + more_tokens, **sizes)
        for name, *arguments in operations:
            getattr(devices, name)(*arguments)
        for _ in range(5000):
            if not devices.live:
                break
            if not devices.launch(4):
                devices.take()
        assert not devices.live, "a request never ends"
        assert devices.scheduler.pages_used == 0
        if count > 1:
            seen.update(devices.seen)

    run()
    for happened in ("all shards", "preemptions"):
        assert seen[happened] >= 50, seen


def test_few_requests_are_spread_and_the_first_come_first():
    devices = Devices(4, num_pages=20, page_size=4, max_rows=2, max_tokens=64)
    for _ in range(10):
        devices.add(4, 4, priority=0)
    devices.launch(1)
    first = [[r.id for r in shard.running] for shard in devices.scheduler.shards]
    assert first == [[0, 4], [1, 5], [2, 6], [3, 7]]
    devices.abort(2)  # request 2: its place goes to the next one
    devices.take()
    devices.launch(1)
    assert [r.id for r in devices.scheduler.shards[2].running] == [6, 8]
    assert devices.scheduler.waiting_count == 1
