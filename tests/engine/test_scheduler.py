"""The scheduler and the page allocator against a model of the device: a table of what each slot of the cache holds."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.engine.pages import PageAllocator
from jaxinfer.engine.request import Request
from jaxinfer.engine.scheduler import Schedule, Scheduler
from jaxinfer.sampling.params import SamplingParams


def request(number: int, prompt: int, new: int) -> Request:
    return Request(
        id=number,
        prompt_length=prompt,
        tokens=[0] * prompt,
        params=SamplingParams(),
        seed=0,
        stop_ids=(),
        limit=prompt + new,
    )


def make(num_pages: int = 9, page_size: int = 4, max_rows: int = 4, max_tokens: int = 8) -> Scheduler:
    return Scheduler(PageAllocator(num_pages, page_size), max_rows, max_tokens)


class Device:
    """Plays the engine and the device: runs schedules, and checks each against what the cache must hold."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler
        self.slots: dict[tuple[int, int], tuple[int, int]] = {}  # (page, offset) -> (request, position)
        self.live: list[Request] = []
        self.count = 0

    def add(self, prompt: int, new: int) -> Request | None:
        """Adds a request, or nothing if it's one that the scheduler must refuse."""
        added = request(self.count, prompt, new)
        pages = self.scheduler.pages
        if pages.pages_for(added.limit) > pages.num_pages - 1:
            with pytest.raises(ValueError, match="pages of the cache, which has"):
                self.scheduler.add(added)
            return None
        self.scheduler.add(added)
        self.live.append(added)
        self.count += 1
        return added

    def abort(self, which: int) -> None:
        self.scheduler.finish(self.live.pop(which % len(self.live)))
        self.check_pages()

    def step(self, max_steps: int, stops_after: int = 10**9) -> Schedule:
        """stops_after: rows that decode meet their stop id after so many tokens of this call."""
        schedule = self.scheduler.schedule(max_steps)
        self.check(schedule, max_steps)
        for each, count in [(r, 1) for r in schedule.decode] + schedule.chunks:
            if schedule.chunks:
                self.feed(each, count)
                sampled = int(each.pending == 0)
            else:
                sampled = min(schedule.steps, each.room, stops_after)
                each.tokens += [0] * (sampled - 1)  # those that are fed within the call
                self.feed(each, sampled)
            each.tokens += [0] * (sampled > 0)
            if each.room == 0 or (sampled and sampled == stops_after):
                self.scheduler.finish(each)
                self.live.remove(each)
        self.check_pages()
        return schedule

    def feed(self, each: Request, count: int) -> None:
        """Writes tokens into the cache and looks at all before them, as attention does."""
        size = self.scheduler.pages.page_size
        for position in range(each.computed, each.computed + count):
            page = each.pages[position // size]
            assert page != 0
            self.slots[page, position % size] = (each.id, position)
        each.computed += count
        for position in range(each.computed):
            assert self.slots[each.pages[position // size], position % size] == (each.id, position)

    def check(self, schedule: Schedule, max_steps: int) -> None:
        scheduler = self.scheduler
        rows = schedule.requests
        assert len({r.id for r in rows}) == len(rows) <= scheduler.max_rows
        assert all(r in scheduler.running for r in rows)
        assert all(r.pending == 1 for r in schedule.decode)
        assert all(0 < count <= r.pending for r, count in schedule.chunks)
        assert len(schedule.decode) + sum(count for _, count in schedule.chunks) <= scheduler.max_tokens
        assert 1 <= schedule.steps <= max_steps
        assert schedule.steps == 1 or not schedule.chunks
        # First come, first served: whoever runs is older than whoever waits, and the oldest always gets on.
        assert [r.id for r in [*scheduler.running, *scheduler.waiting]] == sorted(r.id for r in self.live)
        if self.live:
            assert min(r.id for r in self.live) in [r.id for r in rows]
        self.check_pages()

    def check_pages(self) -> None:
        """Each page is free or belongs to one running request; nobody else holds any."""
        scheduler, pages = self.scheduler, self.scheduler.pages
        held = [page for r in scheduler.running for page in r.pages]
        assert len(held) + pages.free_count == pages.num_pages - 1
        assert len(set(held)) == len(held)
        assert set(held) <= set(range(1, pages.num_pages))
        assert not any(r.pages or r.computed for r in scheduler.waiting)
        for r in scheduler.running:
            assert len(r.pages) <= pages.pages_for(r.limit)

    def restart(self) -> None:
        """What a broken-off step leaves: anything. Then the cache is new."""
        self.slots.clear()
        self.scheduler.restart(self.live)
        self.check_pages()


OPERATIONS = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 24), st.integers(1, 16)),
    st.tuples(st.just("step"), st.integers(1, 8), st.integers(1, 9)),
    st.tuples(st.just("step"), st.integers(1, 8), st.just(10**9)),
    st.tuples(st.just("abort"), st.integers(0, 100)),
    st.tuples(st.just("restart")),
)


@settings(max_examples=1500, deadline=None, derandomize=True, database=None)
@given(
    num_pages=st.integers(2, 24),
    page_size=st.integers(1, 8),
    max_rows=st.integers(1, 5),
    more_tokens=st.integers(0, 12),
    operations=st.lists(OPERATIONS, min_size=5, max_size=40),
)
def test_any_sequence_of_events(num_pages, page_size, max_rows, more_tokens, operations):
    device = Device(make(num_pages, page_size, max_rows, max_rows + more_tokens))
    for name, *arguments in operations:
        if name != "abort" or device.live:
            getattr(device, name)(*arguments)
    needed = sum(r.limit for r in device.live)
    for _ in range(1 + needed * len(device.live)):
        if not device.live:
            break
        device.step(4)
    assert not device.live, "a request never ends"
    assert device.scheduler.pages.free_count == num_pages - 1
    assert not device.step(4).requests


def test_the_youngest_gives_its_pages_back_and_begins_anew():
    device = Device(make(num_pages=5, page_size=4, max_rows=3, max_tokens=16))
    old, young = device.add(7, 9), device.add(7, 9)
    device.step(1)
    device.step(1)
    assert [len(r.tokens) for r in (old, young)] == [9, 9]
    schedule = device.step(1)  # each needs a third page, and there are four
    assert schedule.decode == [old]
    assert (young.preemptions, young.computed, young.pages) == (1, 0, [])
    assert len(young.tokens) == 9  # its output so far is kept
    while old in device.live:
        assert young not in device.step(2).requests
    schedule = device.step(2)
    assert schedule.chunks == [(young, 9)]
    while young in device.live:
        device.step(2)
    assert (len(old.tokens), len(young.tokens)) == (16, 16)
    assert (old.preemptions, young.preemptions) == (0, 1)


def test_prompts_go_in_chunks_beside_rows_that_decode():
    device = Device(make(num_pages=50, max_rows=3, max_tokens=8))
    first, second, third = device.add(3, 9), device.add(12, 2), device.add(4, 2)
    assert device.step(4).chunks == [(first, 3), (second, 5)]
    schedule = device.step(4)
    assert (schedule.decode, schedule.chunks) == ([first], [(second, 7)])
    schedule = device.step(4)
    assert (schedule.decode, schedule.chunks, schedule.steps) == ([first, second], [(third, 4)], 1)
    assert device.step(4).steps == 4


def test_steps_are_as_many_as_somebody_wants_and_as_pages_allow():
    device = Device(make(num_pages=50))
    device.add(4, 3)
    device.add(4, 20)
    device.step(32)
    assert device.step(32).steps == 19  # the longest; the other row ends on the way
    device = Device(make(num_pages=6, max_rows=1))
    first = device.add(4, 12)
    waiting = device.add(4, 4)
    device.step(32)
    assert waiting in device.scheduler.waiting
    assert device.step(8).steps == 8
    assert len(first.pages) == 3  # 12 tokens in the cache
    device = Device(make(num_pages=3, page_size=4, max_rows=2))
    device.add(3, 5)
    device.add(3, 5)
    device.step(32)
    assert device.step(4).steps == 1  # a second page for each is not there


def test_a_request_that_never_fits_is_refused():
    with pytest.raises(ValueError, match="up to 33 tokens needs 9 pages of the cache, which has 8; lower max_tokens"):
        make().add(request(0, 13, 20))


def test_a_token_budget_below_the_rows_is_refused():
    with pytest.raises(ValueError, match="max_num_batched_tokens is 3: it must be at least max_num_seqs, 4"):
        make(max_tokens=3)


def test_pages():
    pages = PageAllocator(4, 16)
    mine: list[int] = []
    assert [pages.pages_for(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]
    assert pages.grow(mine, 17)
    assert pages.grow(mine, 5)  # already there
    assert len(set(mine)) == len(mine) == 2
    assert not pages.grow(mine, 16 * 4 + 1)
    assert (len(mine), pages.free_count) == (2, 1)
    pages.release(mine)
    assert (mine, pages.free_count) == ([], 3)
    with pytest.raises(ValueError, match="num_pages is 1: it must be at least 2"):
        PageAllocator(1, 16)
