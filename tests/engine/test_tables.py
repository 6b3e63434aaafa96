"""Grammars that the device follows by tables: as masks have it, in every state."""

import random
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxinfer import LLM, SamplingParams
from jaxinfer.engine.guided import guides, states, tables
from jaxinfer.engine.guided.automaton import DEAD, START, Automaton, NotRegular
from jaxinfer.engine.request import Request
from jaxinfer.engine.table_blocks import TableBlocks, place_of
from jaxinfer.sampling.table_sizes import BLOCK, BLOCKS, COMPLETE, FORCED
from jaxinfer.sampling.tables import TokenTables
from tests.engine.test_guided import OPTIONS, prompt, tokens
from tests.settled import settled

PATTERNS = {
    "a*": "a",
    "(ab)*|b+": "ab",
    "(a|)b?c{2}": "abc",
    "((a|b){2}c){1,3}": "abc",
    "a{2,}b{0,2}": "ab",
    r"[-+]?[0-9]+(\.[0-9]+)?": "+-.07",
    r"^\([^a-c\n]+\)$": "()ad\n",
    "x.y": "xyé\n",
    "(é|ü)+[^x-z]": "éüxw",
    r"[\]\-a-]*\\": "]-ab\\",
    r"\d[\d.]": "07.٣a",
}
REFUSED = [r"\w+", r"[^\d]", "a*?", "(?i)a", "a|^b", "[[a]]", "[a&&b]", "[é]", "(", "a{3,2}", "a{9999}", "(.{9}a){99}"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_automata(pattern):
    """Texts as `re` has them; in the state in which one ends nothing has to follow."""
    automaton, rng = Automaton.of_regex(pattern, np.inf), random.Random(0)
    going_on = {True: set(), False: set()}
    for _ in range(2000):
        text = "".join(rng.choices(PATTERNS[pattern], k=rng.randint(0, 8)))
        at = START
        for byte in text.encode():
            at = automaton.next[at, automaton.kinds[byte]]
        matches = re.fullmatch(pattern, text) is not None
        assert at != DEAD or not matches
        going_on[matches].add(int(at))
    assert going_on[True]
    assert not going_on[True] & going_on[False]


@pytest.mark.parametrize("pattern", REFUSED)
def test_what_has_no_automaton(pattern):
    with pytest.raises(NotRegular):
        Automaton.of_regex(pattern, np.inf)


@pytest.fixture(scope="module")
def llm(checkpoints):
    with LLM(checkpoints("llama").folder, **OPTIONS) as llm:
        yield llm
        settled(llm)


@pytest.fixture
def by(llm, monkeypatch):
    """Makes grammars go by tables, however long they take, or by masks."""

    def switch(way, of=llm):
        monkeypatch.setattr(states, "BUILT_IN", 60.0)
        monkeypatch.setattr(guides, "table_of", states.table_of if way == "tables" else lambda *_: None)
        of.engine.guides._tables.clear()

    return switch


GRAMMARS = [
    *({"regex": pattern} for pattern in PATTERNS),
    {"choice": ["a", "ab", "abc", "yes and no", "yes and yes"]},
    {"choice": ["日本", "日本語", 'n"\n']},
    {"choice": ["only"]},
    {"json": {"enum": ["red", 'a"b', "ü", 12, None], "title": "Colour"}},
    {"json": {"type": "boolean"}},
]


@pytest.mark.parametrize("more", [{}, {"ignore_eos": True}, {"stop_token_ids": [7]}], ids=str)
def test_tables_say_what_masks_say(llm, by, more):
    by("tables")
    of_engine, rng = llm.engine.guides, np.random.default_rng(0)
    for grammar in GRAMMARS:
        start = llm.engine.check([1], SamplingParams(structured_outputs=grammar, **more))[2]
        table = start.table
        assert table is not None
        for walk in range(8):
            own = start.anew()
            for _ in range(24):
                (mask,) = of_engine._masks([own])
                np.testing.assert_array_equal(table.masks[own.state], mask)
                tail = own.forced()
                forced = bool(tail) and own.ends_with(tail)
                assert (table.ends[own.state] == FORCED) == forced
                assert table.tails.get(own.state) == (tail if forced else None)
                (allowed,) = np.unpackbits(mask.view(np.uint8), bitorder="little").nonzero()
                # Long tokens and bytes of characters both come.
                some = rng.choice(allowed, 4).tolist()
                own.accept([max(some, key=lambda i: len(of_engine.prepare().tokens[i]) * (-1) ** walk)])
                assert own.complete == (table.ends[own.state] == COMPLETE)
                if own.complete:
                    break
    assert table.after(tables.BEGIN, int(np.flatnonzero(table.classes == 0)[0])) == tables.LOST


CHOICES = ["yes", "no", "yes and no", "international sports", "international politics"]


@pytest.fixture(scope="module")
def mixed():
    def asked(seed, max_tokens=20, **more):
        return SamplingParams(temperature=1.0, seed=seed, max_tokens=max_tokens, **more)

    number, label = {"regex": "[0-9]{3}-[a-f]{2,4}"}, {"choice": CHOICES}
    params = [
        asked(1, structured_outputs=label),
        asked(2, structured_outputs=label, logprobs=2),
        asked(3, structured_outputs=number, n=3),
        asked(4, structured_outputs=number, repetition_penalty=1.3, min_tokens=7),
        asked(5, structured_outputs={"regex": "[a-z ]+"}, ignore_eos=True, max_tokens=40),
        asked(6, ignore_eos=True, max_tokens=40),
        asked(7, structured_outputs=number, logit_bias={60: 4.0}, stop="-"),
        asked(8, structured_outputs={"choice": ["only"]}, max_tokens=2),
        asked(9, structured_outputs=label, bad_words=["yes a"]),  # the host looks at all of its tokens
    ]
    return [prompt(i) for i in range(len(params))], params


def generated(llm, mixed):
    outputs = llm.generate(*mixed, use_tqdm=False)
    assert all(output.error is None for output in outputs)
    return outputs


@pytest.fixture
def by_masks(llm, by, mixed):
    by("masks")
    before = llm.stats.table_tokens
    expected = generated(llm, mixed)
    assert llm.stats.table_tokens == before
    return expected


def test_the_same_tokens(llm, by, mixed, by_masks):
    """Alone, in company, beside masks and beside none; in fewer calls."""
    by("tables")
    before = llm.stats.table_tokens
    together = generated(llm, mixed)
    assert tokens(together) == tokens(by_masks)
    assert llm.stats.table_tokens > before + 60
    alone = [llm.generate(p, q, use_tqdm=False)[0] for p, q in zip(*mixed, strict=True)]
    assert tokens(alone) == tokens(by_masks)
    for ours, theirs in zip(alone[1].outputs[0].logprobs, by_masks[1].outputs[0].logprobs, strict=True):
        assert ours.keys() == theirs.keys()
        for i, one in theirs.items():
            assert ours[i].logprob == pytest.approx(one.logprob, abs=1e-4)
    some = [mixed[0][4:6], mixed[1][4:6]]  # one by a table, one without a grammar
    calls = llm.stats.calls
    assert tokens(generated(llm, some)) == tokens(by_masks[4:6])
    assert llm.stats.calls - calls < 10, "both stay in the loop on the device"


def test_tables_that_are_kept(llm, by, monkeypatch):
    by("tables")
    engine, kept = llm.engine, llm.engine.guides._tables

    def table(text, **more):
        return engine.check([1], SamplingParams(structured_outputs={"choice": [text, "b"]}, **more))[2].table

    first = table("a")
    assert table("a") is first
    assert table("a", ignore_eos=True) is not first
    assert len(kept) == 2
    monkeypatch.setattr(guides, "TABLE_BYTES", 2 * first.nbytes)
    assert table("c") is table("c")
    assert len(kept) == 2
    assert table("a") is not first


def test_without_room(llm, by, mixed, by_masks, monkeypatch):
    by("tables")
    monkeypatch.setattr(TableBlocks, "_taken", lambda *_: None)
    before = llm.stats.table_tokens
    assert tokens(generated(llm, mixed)) == tokens(by_masks)
    assert llm.stats.table_tokens == before


@pytest.mark.slow
def test_preempted_ones_go_on(checkpoints, by, mixed, by_masks):
    small = {"kv_cache_memory": 12 * 8 * 2 * 2 * 2 * 8 * 4, "max_model_len": 88}
    with LLM(checkpoints("llama").folder, **small, **OPTIONS) as llm:
        by("tables", llm)
        assert tokens(generated(llm, mixed)) == tokens(by_masks)
        assert llm.stats.preemptions > 0
        assert llm.stats.table_tokens > 60


@pytest.mark.slow
def test_a_mesh_changes_nothing(checkpoints, by, mixed, by_masks):
    with LLM(checkpoints("llama").folder, mesh="data=2,tensor=2", **OPTIONS) as llm:
        by("tables", llm)
        assert tokens(generated(llm, mixed)) == tokens(by_masks)
        assert llm.stats.table_tokens > 60
        assert llm.stats.table_loads > 4, "each shard of rows has its own"


def test_blocks():
    """Tables that nobody holds make room, those used longest ago first; where there is none, a row goes by masks."""

    def table(blocks):
        size = blocks * BLOCK
        return tables.GrammarTable(
            masks=np.zeros((size, 1), np.uint32),
            classes=np.zeros(32, np.uint16),
            next=np.arange(size, dtype=np.uint16)[:, None],
            ends=np.zeros(size, np.uint8),
            tails={},
            longest=np.zeros(size, np.int32),
        )

    def request(of):
        guide = SimpleNamespace(table=of, state=1)
        return Request(0, 1, [1], SamplingParams(), 0, (), 9, guide=guide)

    large, small, other, all_of_them = table(BLOCKS - 2), table(1), table(2), table(BLOCKS)
    held, blocks = {}, TableBlocks()
    for name, of in (("large", large), ("small", small), ("same", small), ("other", other)):
        blocks.hold(held.setdefault(name, request(of)))
    assert len(held["large"].table) == BLOCKS - 2
    assert held["small"].table == held["same"].table
    assert held["other"].table is None
    assert [block for block, _ in blocks.coming()] == [*held["large"].table, *held["small"].table]
    assert not list(blocks.coming())
    for name in ("large", "small"):
        blocks.release(held[name])
    blocks.hold(again := request(all_of_them))
    assert again.table is None, "another one holds the small one"
    blocks.release(held["same"])
    blocks.hold(held["other"])
    (first, value), _ = blocks.coming()
    own = held["other"].table
    assert first == own[0]
    assert value.next[5, 0] == place_of(5, own) == own[0] * BLOCK + 5
    blocks.hold(back := request(small))
    assert not list(blocks.coming()), "it is still there"
    assert blocks.loads == 3
    expected = TokenTables.shapes(32)  # or other hosts could not read it
    assert jax.tree.all(jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), value, expected))
    blocks.reset()
    blocks.hold(back)
    assert len(list(blocks.coming())) == 1


@pytest.mark.parametrize(("logprobs", "expected"), [(None, [3, 1, 1, 30]), (0, [30, 28, 25, 30])])
def test_how_many_more_may_come(logprobs, expected):
    """Who waits gets a row when its text must be complete: calls have no more steps than that."""
    table = SimpleNamespace(longest=np.array([0, 3, tables.MOST]))
    guide, params = SimpleNamespace(table=table, state=1), SamplingParams(logprobs=logprobs)
    request = Request(0, 1, [1], params, 0, (), 31, guide=guide, table=[0])
    found = [request.most_left]
    for on_their_way in (2, 5):
        request.length = 1 + on_their_way
        found.append(request.most_left)
    request.length, guide.state = 1, 2
    assert [*found, request.most_left] == expected
