"""A model of the engine and the device for tests of the scheduler: what each slot of the cache holds, in plain Python.

Calls run on the device in the order in which they were launched; the host learns of their tokens later. What a cache
slot holds depends on the token there and on all tokens before it, so the model keeps a hash of those.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from typing import NamedTuple

import pytest

from jaxinfer.cache import CacheGroup
from jaxinfer.engine.kv_cache import KVCacheManager
from jaxinfer.engine.pages import PageAllocator
from jaxinfer.engine.programs import reach
from jaxinfer.engine.request import Held, Request
from jaxinfer.engine.scheduler import Scheduler, SchedulerOutput
from jaxinfer.sampling.params import SamplingParams

NEVER = 10**9
MAX_STEPS = 8  # of a call, where there are windows
KINDS = {
    "plain": SamplingParams(),
    "penalized": SamplingParams(presence_penalty=1.0),
    "scored": SamplingParams(prompt_logprobs=0),
    "text": SamplingParams(prompt_logprobs=0),  # whose second half is scored, and nothing sampled
}


def request(number: int, prompt: int | list[int], new: int, priority: int = 0, kind: str = "plain") -> Request:
    tokens = [number + 2] * prompt if isinstance(prompt, int) else list(prompt)
    text = kind == "text"
    return Request(
        id=number,
        prompt_length=len(tokens),
        tokens=tokens,
        params=KINDS[kind],
        seed=0,
        stop_ids=(),
        limit=len(tokens) + (0 if text else new),
        priority=priority,
        scored_from={"scored": 1, "text": 1 + len(tokens) // 2}.get(kind),
        target=0 if text else None,
    )


def make(
    num_pages: int = 9,
    page_size: int = 4,
    max_rows: int = 4,
    max_tokens: int = 8,
    prefix_caching: bool = True,
    windows: Sequence[int | None] = (None,),
    snapshots: int | None = None,
) -> Scheduler:
    """With a cache group for each window, all in one pool, and states with so many copies, if any."""
    groups = [CacheGroup((i,), (0,), 0, window) for i, window in enumerate(windows)]
    return Scheduler(
        KVCacheManager(
            groups,
            [num_pages],
            page_size,
            reach(max_tokens, MAX_STEPS),
            prefix_caching,
            None if snapshots is None else range(max_rows, max_rows + snapshots),
        ),
        max_rows,
        max_tokens,
    )


def pool(scheduler: Scheduler) -> PageAllocator:
    return scheduler.cache.pools[0]


def most_pages(scheduler: Scheduler, tokens: int) -> list[int]:
    """That a sequence holds at once in each group."""
    cache = scheduler.cache
    return [group.most_pages(tokens, cache.page_size, cache.reach) for group in cache.groups]


def pages_of(request: Request) -> list[int]:
    return [page for held in request.pages for page in held.pages]


def key(request: Request) -> tuple[int, int]:
    return request.priority, request.id


class Stops(NamedTuple):
    """The length at which a sequence meets a stop id (the device sees it), a stop string (only the host does)."""

    device: int = NEVER
    host: int = NEVER


class Call(NamedTuple):
    schedule: SchedulerOutput
    sampled: list[list[int]]


class Device:
    """Launches schedules and takes their tokens in; checks each against what the cache must hold."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler
        # (page, offset) -> the group, and a hash of the sequence up to there
        self.cache: dict[tuple[int, int], tuple[int, int]] = {}
        self.states: dict[int, tuple[int, int]] = {}  # by slot: how many tokens it has seen, and a hash of them
        self.truth: dict[int, list[int]] = {}  # each request's tokens as the device knows them
        self.hashes: dict[int, list[int]] = {}
        self.logits: dict[int, set[int]] = {}  # positions of prompts whose logits there were
        self.alive: dict[int, bool] = {}  # by slot
        self.stops: dict[int, Stops] = {}
        self.live: list[Request] = []
        self.following: set[Request] = set()
        self.in_flight: deque[Call] = deque()
        self.seen: Counter[str] = Counter()
        self.count = 0

    def add(
        self, prompt: int | list[int], new: int, priority: int = 0, kind: str = "plain", stops: Stops | None = None
    ) -> Request | None:
        """Adds a request, or nothing if it's one that the scheduler must refuse."""
        added = request(self.count, prompt, new, priority, kind)
        if sum(most_pages(self.scheduler, added.limit)) > pool(self.scheduler).num_pages - 1:
            with pytest.raises(ValueError, match="pages of the cache, which has"):
                self.scheduler.add(added)
            return None
        self.scheduler.add(added)
        self.live.append(added)
        self.stops[added.id] = stops or Stops()
        self.reset(added)
        self.count += 1
        return added

    def reset(self, each: Request) -> None:
        self.truth[each.id] = list(each.tokens)
        self.hashes[each.id] = []
        self.logits.setdefault(each.id, set())

    def abort(self, which: int) -> None:
        if self.live:
            self.end(self.live[which % len(self.live)])
            self.seen["aborts"] += 1
            self.check_pages()

    def end(self, each: Request) -> None:
        self.scheduler.finish(each)
        self.live.remove(each)

    def restart(self) -> None:
        """What a broken-off step leaves: anything. Then the cache is new."""
        self.in_flight.clear()
        self.cache.clear()
        self.states.clear()
        self.alive.clear()
        self.scheduler.restart(self.live)
        for each in self.live:
            self.reset(each)
        self.check_pages()

    def step(self, max_steps: int = 1) -> SchedulerOutput:
        """A call with nothing else in flight, and its tokens."""
        while self.in_flight:
            self.take()
        schedule = self.launch(max_steps)
        self.take()
        return schedule

    def launch(self, max_steps: int) -> SchedulerOutput:
        scheduler = self.scheduler
        before = list(scheduler.running)
        preemptions = {r: r.preemptions for r in self.live}
        exact = not self.in_flight
        schedule = scheduler.schedule(max_steps, may_preempt=exact)
        preempted = [r for r in self.live if r.preemptions > preemptions[r]]
        admitted = [r for r in scheduler.running if r not in before or r in preempted]
        self.seen["preemptions"] += len(preempted)
        self.seen["hits"] += sum(r.hits > 0 for r in admitted)
        self.seen["overlapped"] += bool(self.in_flight and schedule.requests)
        self.seen["short"] += schedule.out_of_pages
        assert exact or not preempted
        for each in preempted:
            assert self.truth[each.id] == each.tokens
            self.reset(each)
        self.check(schedule, max_steps, exact, preempted, admitted, before)
        self.copy(schedule)
        sampled = []
        for i in range(len(schedule.requests)):
            self.following = {r for r in schedule.requests[i + 1 :] if r in admitted}
            sampled.append(self.run(schedule, i))
        if schedule.requests:
            self.in_flight.append(Call(schedule, sampled))
        return schedule

    def copy(self, schedule: SchedulerOutput) -> None:
        """What comes before the call."""
        for pairs in schedule.copies[:-1]:
            self.seen["copied pages"] += len(pairs)
            for source, target in pairs:
                for offset in range(self.scheduler.cache.page_size):
                    if (source, offset) in self.cache:
                        self.cache[target, offset] = self.cache[source, offset]
        for source, target in schedule.copies[-1] if schedule.copies else ():
            self.seen["kept states" if target >= self.scheduler.max_rows else "states gone on from"] += 1
            self.states[target] = self.states[source]

    def take(self) -> None:
        """Takes the oldest call's tokens in, as the engine does."""
        if not self.in_flight:
            return
        schedule, sampled = self.in_flight.popleft()
        for i, (each, tokens) in enumerate(zip(schedule.requests, sampled, strict=True)):
            if each not in self.live:
                continue
            if each.target is not None and schedule.start[i] + schedule.counts[i] == each.prompt_length:
                assert self.logits[each.id] >= set(range(each.first_logits, each.prompt_length))
                self.seen["texts"] += 1
                self.end(each)
            if not tokens:
                continue
            stops = self.stops[each.id]
            ended = False
            for token in tokens:
                each.tokens.append(token)
                ended = len(each.tokens) >= min(stops.device, stops.host, each.limit)
                if ended:
                    break
            assert each.slot >= 0
            if len(each.tokens) == stops.device:
                each.length = len(each.tokens)
            self.scheduler.publish(each, len(each.tokens) - 1)
            if ended:
                self.end(each)
        self.check_pages()

    def run(self, schedule: SchedulerOutput, i: int) -> list[int]:
        """What the device does with one row of a call: its sampled tokens."""
        each, start, samples = schedule.requests[i], schedule.start[i], schedule.samples[i]
        truth = self.truth[each.id]
        if i < len(schedule.decode):
            if not self.alive[each.slot]:
                self.seen["dead rows"] += 1
                return []
            sampled = []
            for position in range(start, start + min(samples, schedule.steps)):
                assert len(truth) == position + 1
                self.feed(each, position, position + 1)
                sampled.append(self.sample(each))
                if not self.alive[each.slot]:
                    break
            return sampled
        count = schedule.counts[i]
        assert each.tokens[start : start + count] == truth[start : start + count]
        assert start + count <= len(each.tokens)
        self.feed(each, start, start + count)
        self.logits[each.id] |= set(range(start, start + count))
        if samples:
            assert start + count == len(truth)
        return [self.sample(each)] if samples else []

    def sample(self, each: Request) -> int:
        """As greedy sampling does: the same beginning is continued in the same way."""
        truth = self.truth[each.id]
        truth.append(self.hashes[each.id][-1] // 8 % 2)
        self.alive[each.slot] = len(truth) < self.stops[each.id].device
        return truth[-1]

    def feed(self, each: Request, start: int, end: int) -> None:
        """Writes tokens into the cache and looks at all up to them, as attention does."""
        cache, pages = self.scheduler.cache, pool(self.scheduler)
        size = cache.page_size
        hashes = self.hashes[each.id]
        for position in range(len(hashes), end):
            hashes.append(hash((hashes[-1] if hashes else 0, self.truth[each.id][position])))
        if cache.snapshots is not None:
            assert start == 0 or self.states[each.slot] == (start, hashes[start - 1]), "goes on from somebody else's"
            self.states[each.slot] = end, hashes[end - 1]
        widths = most_pages(self.scheduler, NEVER)
        for i, (group, held) in enumerate(zip(cache.groups, each.pages, strict=True)):
            first = 0 if group.window is None else max(0, start - group.window + 1)
            self.seen["out of the window"] += held.first > 0

            def page_of(position: int, held: Held = held, width: int = widths[i]) -> int:
                at = position // size - held.first
                assert 0 <= at < width, "beyond the table"
                return held.pages[at]

            for position in range(start, end):
                page = page_of(position)
                assert page != 0
                assert len(pages._key_of.get(page, ())) < 3, "somebody may go on from the middle of it"
                if pages._references[page] > 1:  # only by those that join in this call and come after this row
                    others = {r for r in self.scheduler.running if page in pages_of(r) and r is not each}
                    assert others <= self.following, "a page that others hold too is written to"
                    self.seen["shared in a call"] += 1
                self.cache[page, position % size] = i, hashes[position]
            for position in range(first, end):
                page = page_of(position)
                self.seen["shared reads"] += pages._references[page] > 1
                assert self.cache[page, position % size] == (i, hashes[position]), "attends to somebody else's tokens"

    def check(
        self,
        schedule: SchedulerOutput,
        max_steps: int,
        exact: bool,
        preempted: list[Request],
        admitted: list[Request],
        before: list[Request],
    ) -> None:
        scheduler = self.scheduler
        rows = schedule.requests
        waiting = [r for r in self.live if r.slot < 0]
        assert len({r.id for r in rows}) == len(rows) <= scheduler.max_rows
        assert all(r in scheduler.running for r in rows)
        assert all(count > 0 for _, count in schedule.chunks)
        assert sum(schedule.counts) <= scheduler.max_tokens
        assert 1 <= schedule.steps <= max_steps
        assert schedule.steps == 1 or not schedule.chunks
        assert all(r.length <= r.limit for r in self.live)
        # By priority, then first come, first served: nobody overtakes, and who is preempted is the youngest.
        if admitted and waiting:
            assert max(map(key, admitted)) <= min(map(key, waiting))
        stayed = [r for r in before if r in self.live and r not in preempted]
        if preempted and stayed:
            assert min(map(key, preempted)) >= max(map(key, stayed))
        if self.live and exact:
            assert rows, "nothing runs, and there is something to do"
            if len({r.priority for r in self.live}) == 1:
                assert min(self.live, key=key) in rows, "the oldest does not get on"
        self.check_pages()

    def check_pages(self) -> None:
        """Each page is free, kept or held, and counted once for each running request that holds it."""
        scheduler, pages = self.scheduler, pool(self.scheduler)
        held = Counter(page for r in scheduler.running for page in pages_of(r))
        assert sorted([*pages._blank, *pages._unused, *held]) == list(range(1, pages.num_pages))
        assert pages.free_count == pages.num_pages - 1 - len(held)
        assert held == {p: n for p, n in enumerate(pages._references) if n}
        assert pages._page_of == {k: p for p, k in pages._key_of.items()}
        assert set(pages._unused) <= set(pages._key_of) <= {*pages._unused, *held}
        assert {r.id for r in scheduler.running} | {r.id for *_, r in scheduler._waiting} == {r.id for r in self.live}
        assert len(scheduler.running) + scheduler.waiting_count == len(self.live)
        assert sorted([*scheduler._free_slots, *(r.slot for r in scheduler.running)]) == list(range(scheduler.max_rows))
        for r in self.live:
            assert (r.slot >= 0) == (r in scheduler.running)
            assert len(set(pages_of(r))) == len(pages_of(r))
            for group, most in zip(r.pages, most_pages(scheduler, r.limit), strict=False):
                assert len(group.pages) <= most
            assert r.slot >= 0 or not (r.pages or r.computed or r.decoding or r.cuts)
        cache = scheduler.cache
        for known, r in cache._coming.items():
            assert r in scheduler.running
            assert known in [cache._key(r, cut // cache.page_size) for cut in r.cuts]
