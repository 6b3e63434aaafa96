"""The scheduler and the page allocator against a model of the device: a table of what each slot of the cache holds."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.engine.pages import PageAllocator
from jaxinfer.engine.request import Held
from tests.engine.device import KINDS, NEVER, Device, Stops, make, most_pages, pages_of, request
from tests.engine.operations import sequences

# Few different beginnings, so that they really meet in the prefix cache.
PROMPTS = st.builds(
    lambda pattern, length, tail: [pattern >> i % 2 & 1 for i in range(length)] + tail,
    st.integers(0, 3),
    st.integers(1, 24),
    st.lists(st.integers(0, 1), max_size=3),
)
STOPS = st.builds(lambda device, host: Stops(device, host), *[st.integers(2, 30) | st.just(NEVER)] * 2)
KIND = st.sampled_from(["plain"] * 4 + list(KINDS))
OPERATIONS = sequences(
    st.tuples(st.just("add"), PROMPTS, st.integers(1, 16), st.integers(0, 2), KIND, STOPS),
    st.tuples(st.just("add"), PROMPTS, st.integers(1, 16)),
    min_size=10,
)
IN_FLIGHT = 2


def play(device: Device, operations) -> None:
    for name, *arguments in operations:
        if name == "launch" and len(device.in_flight) == IN_FLIGHT:
            device.take()
        getattr(device, name)(*arguments)
        device.seen["events"] += 1


def drain(device: Device) -> None:
    """Runs everything to its end, with a call always in flight."""
    for _ in range(10 + 4 * sum(r.limit for r in device.live) * (1 + len(device.live))):
        if not device.live:
            break
        if not device.launch(4).requests or len(device.in_flight) == IN_FLIGHT:
            device.take()
        device.seen["events"] += 1
    assert not device.live, "a request never ends"
    assert device.scheduler.cache.pages_used == 0
    assert not device.scheduler.schedule(4).requests
    assert device.scheduler.idle


def test_any_sequence_of_events():
    seen: Counter[str] = Counter()

    @settings(max_examples=1500, deadline=None, derandomize=True, database=None)
    @given(
        num_pages=st.integers(2, 24),
        page_size=st.integers(1, 5),
        max_rows=st.integers(1, 5),
        more_tokens=st.integers(0, 12),
        prefix_caching=st.sampled_from([True, True, True, False]),
        operations=OPERATIONS,
    )
    def run(num_pages, page_size, max_rows, more_tokens, prefix_caching, operations):
        max_tokens = max_rows + more_tokens
        device = Device(make(num_pages, page_size, max_rows, max_tokens, prefix_caching))
        play(device, operations)
        drain(device)
        seen.update(device.seen)

    run()
    assert seen["events"] >= 10_000
    for happened in (
        "hits",
        "shared reads",
        "preemptions",
        "overlapped",
        "short",
        "dead rows",
        "aborts",
        "texts",
        "shared in a call",
    ):
        assert seen[happened] >= 100, (happened, seen)


def test_many_that_share_little_room():
    """Twelve requests, four of a kind, in a cache for two, with aborts: shared pages are preempted and evicted."""
    seen: Counter[str] = Counter()
    for seed in range(40):
        device = Device(make(num_pages=12, page_size=2, max_rows=6, max_tokens=12))
        for i in range(12):
            prompt = [i % 3 & 1, i % 3 >> 1] * 4
            device.add(prompt, 14, priority=seed % 2 * (i % 2), stops=Stops(host=14 + (i * seed) % 9))
        for i in range(30):
            device.launch(1 + (seed + i) % 5)
            if len(device.in_flight) == IN_FLIGHT:
                device.take()
            if i % 7 == seed % 7:
                device.abort(i * seed)
        drain(device)
        seen.update(device.seen)
    assert seen["preemptions"] >= 40, seen
    assert seen["shared reads"] >= 1000, seen


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
    (chunk,) = schedule.chunks
    assert chunk[0] is young
    assert chunk[1] + schedule.start[0] == 9  # its first page may still be in the cache
    while young in device.live:
        device.step(2)
    assert (len(old.tokens), len(young.tokens)) == (16, 16)
    assert (old.preemptions, young.preemptions) == (0, 1)


def test_who_was_preempted_comes_back_when_there_is_room_to_go_on():
    for preemptions in (0, 1):
        device = Device(make(num_pages=4, page_size=4, max_rows=3, max_tokens=32))
        old, young = device.add(4, 2), device.add(8, 1)
        young.preemptions = preemptions
        # The old one needs a second page next, and there are two: a new request takes both, this one leaves one.
        assert device.step(1).requests == ([old] if preemptions else [old, young])
        while old in device.live:
            device.step(1)
        drain(device)


def test_nobody_is_preempted_while_tokens_are_on_their_way():
    device = Device(make(num_pages=5, page_size=4, max_rows=3, max_tokens=16))
    old, young = device.add(7, 9), device.add(7, 9)
    device.launch(1)
    device.launch(1)
    device.take()
    schedule = device.launch(1)  # a third page each
    assert schedule.out_of_pages
    assert not schedule.requests  # the oldest must not stand still while the youngest goes on
    device.take()
    assert device.launch(1).requests == [old]
    assert young.preemptions == 1
    drain(device)


def test_a_priority_goes_before_who_came_first():
    device = Device(make(num_pages=50, max_rows=1))
    first, second, urgent = device.add(4, 3), device.add(4, 3), device.add(4, 3, priority=-1)
    order = []
    while device.live:
        order += [r for r in device.step(1).requests if r not in order]
    assert order == [urgent, first, second]


def test_a_beginning_is_computed_once():
    device = Device(make(num_pages=50, page_size=4, max_rows=4, max_tokens=64))
    first = device.add([1] * 20, 4)
    schedule = device.launch(1)
    assert (schedule.chunks, schedule.start) == ([(first, 20)], [0])
    second, third, longer = device.add([1] * 20, 4), device.add([1] * 9 + [0] * 3, 4), device.add([1] * 30, 4)
    schedule = device.launch(1)  # the first one's pages are found before its tokens have arrived
    assert schedule.requests == [first, second, third, longer]
    assert schedule.start == [20, 16, 8, 20]  # the last token is always computed: its logits are wanted
    assert [r.hits for r in (first, second, third, longer)] == [0, 16, 8, 20]
    assert pages_of(second)[:4] == pages_of(first)[:4]
    assert pages_of(second)[4] != pages_of(first)[4]
    assert pages_of(longer)[:5] == pages_of(first)[:5]
    drain(device)
    again = device.add([1] * 20, 4)  # nobody holds the pages any more, and their content is kept
    assert device.launch(1).start == [16]
    assert again.hits == 16
    drain(device)


@pytest.mark.parametrize(("kind", "start"), [("scored", 0), ("penalized", 16)])
def test_who_wants_all_logits_computes_everything(kind, start):
    device = Device(make(num_pages=50, max_tokens=64))
    device.add([1] * 20, 4)
    drain(device)
    device.add([1] * 20, 4, kind=kind)
    assert device.launch(1).start == [start]
    drain(device)


def cached(device: Device, prompt: list[int]) -> int:
    """How many tokens of it the prefix cache has."""
    cache, asked = device.scheduler.cache, request(99, [*prompt, 0], 1)
    assert cache.allocate(asked, 0, 0)
    cache.release(asked)
    return asked.computed


def test_what_was_used_least_recently_is_evicted_first():
    pages = PageAllocator(5)
    a, b = pages.take(2), pages.take(1)
    for held, keys in ((a, "xy"), (b, "z")):
        for page, key in zip(held, keys, strict=True):
            pages.publish(page, key)
        pages.release(held)
    for page in a:
        pages.hold(page)
    pages.release(a)  # used again: b's page is the oldest now, then a's second one
    new = pages.take(2)  # one that was never used, and b's
    assert set(new) == {b[0], 4}
    assert pages.find("z") is None
    assert pages.take(1) == [a[1]]
    assert (pages.find("x"), pages.find("y")) == (a[0], None)  # a's first page outlives its second one
    pages.hold(a[0])
    assert pages.free_count == 0
    pages.release(a[:1])
    assert pages.take(1) == a[:1]
    assert pages.find("x") is None


def test_keys_are_secret_and_depend_on_all_tokens_before():
    first, second = (make(9, 2).cache for _ in range(2))
    keys = []
    for cache, tokens, salt in (
        (first, [1, 2, 3, 4, 5], ""),
        (first, [2, 1, 3, 4], ""),
        (second, [1, 2, 3, 4], ""),
        (first, [1, 2, 3, 4], "a"),
        (first, [1, 2, 3, 4], "\ud800"),
    ):
        asked = request(0, tokens, 1)
        asked.cache_salt = salt
        cache.publish(asked, 0)
        assert len(asked.keys) == 2
        keys += asked.keys
    assert len(set(keys)) == 10


def test_prompts_go_in_chunks_beside_rows_that_decode():
    device = Device(make(num_pages=50, max_rows=3, max_tokens=8))
    first, second, third = device.add(3, 9), device.add(12, 2), device.add(4, 2)
    assert device.step(4).chunks == [(first, 3), (second, 5)]
    schedule = device.step(4)
    assert (schedule.decode, schedule.chunks) == ([first], [(second, 7)])
    schedule = device.step(4)
    assert (schedule.decode, schedule.chunks, schedule.steps) == ([first, second], [(third, 4)], 1)
    assert device.step(4).steps == 4


def test_a_scored_text_begins_with_what_others_have_computed_and_ends_with_its_last_chunk():
    device = Device(make(num_pages=50, page_size=4, max_rows=4, max_tokens=16))
    device.add([1] * 20, 2)
    drain(device)
    text = device.add([1] * 20, 0, kind="text")
    schedule = device.launch(1)
    assert (schedule.chunks, schedule.start, schedule.samples) == ([(text, 12)], [8], [0])  # scored from 11 on
    assert text.hits == 8
    assert not device.launch(1).requests
    device.take()
    assert text not in device.live
    drain(device)


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
    assert waiting.slot == -1
    assert device.scheduler.waiting_count == 1
    assert device.step(8).steps == 8
    assert len(pages_of(first)) == 3  # 12 tokens in the cache
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
    cache, mine = make(4, 16).cache, request(0, 17, 40)
    mine.pages = [Held()]
    assert cache.reserve([(mine, 17)])
    assert cache.reserve([(mine, 5)])  # already there
    assert len(set(pages_of(mine))) == len(pages_of(mine)) == 2
    assert not cache.reserve([(mine, 16 * 3 + 1)])
    assert (len(pages_of(mine)), cache.pages_used, cache.pages_total) == (2, 2, 3)
    cache.release(mine)
    assert (mine.pages, cache.pages_used) == ([], 0)
    with pytest.raises(ValueError, match="num_pages is 1: it must be at least 2"):
        PageAllocator(1)


@pytest.mark.slow
def test_any_sequence_of_events_with_windows():
    """Groups that see everything beside ones with windows, and windows alone, in one pool."""
    seen: Counter[str] = Counter()

    @settings(max_examples=1000, deadline=None, derandomize=True, database=None)
    @given(
        num_pages=st.integers(4, 24),
        page_size=st.integers(1, 5),
        max_rows=st.integers(1, 5),
        more_tokens=st.integers(0, 12),
        windows=st.lists(st.none() | st.integers(1, 12), min_size=1, max_size=3),
        operations=OPERATIONS,
    )
    def run(num_pages, page_size, max_rows, more_tokens, windows, operations):
        device = Device(make(num_pages, page_size, max_rows, max_rows + more_tokens, windows=windows))
        play(device, operations)
        drain(device)
        seen.update(device.seen)

    run()
    for happened in ("hits", "shared reads", "preemptions", "overlapped", "short", "dead rows", "out of the window"):
        assert seen[happened] >= 25, (happened, seen)


def test_pages_that_fall_out_of_the_window_are_given_back():
    """A sequence of any length holds what its window and one call need."""
    device = Device(make(num_pages=13, page_size=4, max_rows=2, max_tokens=16, windows=[8]))
    (most,) = most_pages(device.scheduler, NEVER)
    assert most == 7  # 7 tokens before a chunk of 16
    long = device.add([i % 7 % 2 for i in range(100)], 100)
    while long in device.live:
        device.step(8)
        assert device.scheduler.cache.pages_used <= most
        if long.decoding and long in device.live:
            device.launch(1)
            assert device.scheduler.cache.pages_used <= 4
    assert (len(long.tokens), long.preemptions) == (200, 0)
    assert device.seen["out of the window"]


def test_a_window_needs_no_more_of_a_beginning_than_it_sees(monkeypatch):
    """Of a long prompt the window's last pages are enough; with a group beside that sees everything all are needed."""
    prompt, lost = [i * i % 11 % 2 for i in range(64)], set()
    find = PageAllocator.find
    monkeypatch.setattr(PageAllocator, "find", lambda self, key: None if key in lost else find(self, key))
    for windows, expected in (([8], [64, 60, 48]), ([8, None], [0, 0, 0]), ([None, 8], [64, 60, 48])):
        device = Device(make(num_pages=500, page_size=4, max_rows=2, max_tokens=16, windows=windows))
        device.add(prompt, 1)
        drain(device)
        assert cached(device, prompt) == 64
        asked = request(99, prompt, 1)
        device.scheduler.cache.publish(asked, 0)
        # The first group without its first page and its last but three. Before token 64 the window sees into pages 14
        # and 15 alone, before token 60 into 13 and 14, before token 48 into 10 and 11.
        counts = []
        for pages in ((), (15,), (14,)):
            lost |= {(windows.index(8), asked.keys[page]) for page in (0, 12, *pages)}
            if windows == [8, None]:
                lost.add((1, asked.keys[0]))
            counts.append(cached(device, prompt))
        assert counts == expected
        lost.clear()
