import tracemalloc
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.text.stop import StopStrings

letters = st.text("ab", max_size=30)
stop_lists = st.lists(st.text("ab", min_size=1, max_size=4), max_size=4)


def run(stops: StopStrings, pieces: list[str]) -> str:
    out = ""
    for piece in pieces:
        out += stops.push(piece)
        if stops.matched is not None:
            break
    return out + stops.finish()


def expected(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        ends_here = [stop for stop in stops if text[:end].endswith(stop)]
        if ends_here:
            stop = max(ends_here, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@given(letters, stop_lists, st.booleans(), st.lists(st.integers(0, 30), max_size=8))
def test_every_cutting_gives_the_same(text: str, stops: list[str], include: bool, cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(edges)]
    watcher = StopStrings(stops, include)
    assert (run(watcher, pieces), watcher.matched) == expected(text, stops, include)


@given(letters, letters, stop_lists, st.lists(st.integers(0, 30), max_size=8))
def test_what_may_not_end_yet(before: str, after: str, stops: list[str], cuts: list[int]) -> None:
    """A stop string may begin in the text that may not end yet, but not be complete there."""
    ends = [
        (len(before) + i, stop)
        for stop in stops
        for i in range(1, len(after) + 1)
        if f"{before}{after[:i]}".endswith(stop)
    ]
    end, stop = min(ends, key=lambda match: (match[0], -len(match[1])), default=(None, None))
    edges = [0, *sorted(min(cut, len(before)) for cut in cuts), len(before)]
    watcher = StopStrings(stops)
    text = "".join(watcher.push(before[a:b], may_end=False) for a, b in pairwise(edges))
    text += run(watcher, list(after))
    assert watcher.matched == stop
    assert text == (before + after if end is None else (before + after)[: end - len(stop)])


def test_long_ones_take_no_more_memory() -> None:
    tracemalloc.start()
    stops = StopStrings(["x" * 50_000 + "y"])
    assert [stops.push("x" * 9), stops.push("z")] == ["", "x" * 9 + "z"]
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_nothing_of_a_stop_string_leaks() -> None:
    watcher = StopStrings(["\n\nUser:"])
    assert [watcher.push(piece) for piece in ["hi\n", "\nUs", "a", "\n\n", "User", ":x"]] == [
        "hi",
        "",
        "\n\nUsa",
        "",
        "",
        "",
    ]
    assert watcher.matched == "\n\nUser:"
    assert watcher.push("more") == ""
    assert watcher.finish() == ""


def test_held_text_comes_out_at_the_end() -> None:
    watcher = StopStrings("END")
    assert watcher.push("the EN") == "the "
    assert watcher.finish() == "EN"
    assert watcher.matched is None


def test_no_stop_strings_hold_nothing() -> None:
    watcher = StopStrings([])
    assert watcher.push("abc") == "abc"


@pytest.mark.parametrize("bad", [[""], ["a", ""], [3]])
def test_bad_stop_strings(bad: list[str]) -> None:
    with pytest.raises(ValueError, match="non-empty string"):
        StopStrings(bad)
