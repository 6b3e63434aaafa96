"""Copies of states: nobody goes on from one that has not seen exactly their tokens, whatever happens to whom."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.engine import kv_cache
from jaxinfer.engine.request import Request
from jaxinfer.engine.snapshots import RecentKeys, Snapshots
from tests.engine.device import Device, Stops, make
from tests.engine.operations import sequences
from tests.engine.test_scheduler import KIND, PROMPTS, STOPS, drain, play

OPERATIONS = sequences(
    st.tuples(st.just("add"), PROMPTS, st.integers(1, 16), st.integers(0, 2), KIND, STOPS),
    st.tuples(st.just("add"), PROMPTS, st.integers(1, 16)),
    st.tuples(st.just("follow"), st.integers(0, 100), st.lists(st.integers(0, 1), min_size=1, max_size=3)),
    min_size=10,
)


class Chats(Device):
    def follow(self, which: int, more: list[int]) -> None:
        """Goes on from what was said lately."""
        running = {each.id for each in self.live}
        if said := [tokens for number, tokens in self.truth.items() if number not in running][-3:]:
            self.add([*said[which % len(said)][:40], *more], 4)


def test_any_sequence_of_events(monkeypatch):
    """With pages, with pages of windows, and of states alone: the model of the device sees what each slot and each page
    holds when a row goes on from it."""
    monkeypatch.setattr(kv_cache, "LONG", 6)
    seen: Counter[str] = Counter()

    @settings(max_examples=400, deadline=None, derandomize=True, database=None)
    @given(
        num_pages=st.integers(4, 24) | st.just(50),
        page_size=st.integers(1, 5),
        max_rows=st.integers(1, 5),
        more_tokens=st.integers(0, 12),
        windows=st.sampled_from([(None,), (None, 6), ()]),
        snapshots=st.integers(1, 8),
        operations=OPERATIONS,
    )
    def run(num_pages, page_size, max_rows, more_tokens, windows, snapshots, operations):
        sizes = num_pages, page_size, max_rows, max_rows + more_tokens
        device = Chats(make(*sizes, windows=windows, snapshots=snapshots))
        play(device, operations)
        drain(device)
        states = device.scheduler.cache.states
        assert states.used <= snapshots
        assert sum(len(rests) for rests in states._after.values()) == states.used
        seen.update(device.seen)

    run()
    for happened in ("hits", "copied pages", "states gone on from", "kept states", "preemptions", "aborts", "texts"):
        assert seen[happened] >= 10, (happened, seen)


@pytest.mark.parametrize("windows", [(None,), (None, 6), ()])
def test_chats_beside_each_other(windows):
    """Their turns overlap, and there is too little room for all of them: pages and copies are evicted, rows preempted,
    and some answers are cut short by a stop that the device sees, or does not see."""
    seen: Counter[str] = Counter()
    for seed in range(100):
        rng = random.Random(seed)
        device = Device(make(10 + 4 * rng.randrange(8), 3, 4, 10, windows=windows, snapshots=rng.randint(1, 8)))
        chats: list[tuple[Request | None, list[int]]] = [(None, []) for _ in range(6)]
        for _ in range(60):
            which = rng.randrange(len(chats))
            asked, said = chats[which]
            if asked not in device.live:
                said = [*(asked.tokens if asked is not None else [which % 2] * 4), *rng.choices([0, 1], k=3)]
                stops = Stops(*(len(said) + rng.randint(1, 9) for _ in range(2)))
                chats[which] = device.add(said if len(said) < 24 else said[:4], 6, stops=stops), said
            device.launch(rng.randint(1, 5))
            if len(device.in_flight) == 2:
                device.take()
        drain(device)
        seen.update(device.seen)
    for happened in (
        "hits",
        "states gone on from",
        "kept states",
        *(("copied pages", "preemptions") if windows else ()),
    ):
        assert seen[happened] >= 30, (happened, seen)


def computed(device: Device, prompt: list[int], new: int = 4) -> int:
    """Tokens of a prompt that are computed."""
    asked = device.add(prompt, new)
    assert asked is not None
    drain(device)
    return len(prompt) - asked.hits


@pytest.mark.parametrize("windows", [(None,), (None, 8), ()])
def test_what_is_computed_again(windows):
    """The end of a prompt and that of its answer are known at once, and where prompts part from the second on."""
    device = Device(make(200, 4, max_tokens=64, windows=windows, snapshots=16))
    first = [1, *[0] * 29, 1, 1, 1, 1, 0]
    assert computed(device, first) == 35
    assert computed(device, first) == 3, "from the last full page before its end"
    turn = [*device.truth[0], 1, 0, 1]
    assert computed(device, turn) == 4, "what was sampled last was not computed yet"
    other = [*first[:30], 0, 0, 0, 0, 0, 0]
    asked = device.add(other, 4)
    drain(device)
    assert (asked.hits, asked.stateless) == (0, 28), "its pages are known, and no state"
    assert computed(device, [*first[:30], 0, 1]) == 4
    assert computed(device, [*first[:15], 1] + [0] * 30) == 46


def test_a_long_prompt_is_known_in_its_middle(monkeypatch):
    monkeypatch.setattr(kv_cache, "LONG", 16)
    device = Device(make(400, 4, max_tokens=64, snapshots=16))
    prompt = [i % 7 for i in range(200)]
    assert computed(device, prompt) == 200
    assert [computed(device, [*prompt[:length], 9, 9]) for length in (150, 150, 100, 20)] == [24, 4, 38, 6]


def test_who_shares_what_is_computed_just_now_waits_for_it():
    """Twenty requests at once, that share 100 of 140 tokens."""
    device = Device(make(1000, 4, max_rows=8, max_tokens=96, snapshots=64))
    shared = [i % 5 for i in range(100)]
    for i in range(20):
        device.add([*shared, *[5 + i] * 40], 4)
    work = 0
    while device.live:
        schedule = device.launch(4)
        work += sum(count for _, count in schedule.chunks)
        if len(device.in_flight) == 2 or not schedule.requests:
            device.take()
    assert work * 2.5 <= 20 * 140
    assert work == 2 * 140 + 18 * 40


def test_the_least_recently_used_copy_goes():
    states = Snapshots(range(4, 6))
    assert states.put(b"a") == 4
    assert states.put(b"b", (1, 2)) == 5
    assert states.put(b"a") is None
    assert states.put(b"c") == 5
    assert dict(states.after(b"b")) == {}
    states.use(4)
    assert states.put(b"a", (3,)) == 5
    assert dict(states.after(b"a")) == {(): 4, (3,): 5}
    assert states.used == 2


def test_keys_that_were_seen_lately():
    recent = RecentKeys(2)
    for key in (b"a", b"b", b"a", b"c"):
        recent.add(key)
    assert [key in recent for key in (b"a", b"b", b"c")] == [True, False, True]


def test_no_room_for_copies():
    assert not make(snapshots=0).cache.prefix_caching
    assert make(snapshots=1).cache.prefix_caching
