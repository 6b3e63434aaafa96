"""Adapters in everything that is asked of a loaded model."""

import asyncio
from types import SimpleNamespace

import pytest

import jaxinfer
from jaxinfer import LLM, AsyncEngine, SamplingParams
from tests.adapters import write_adapter
from tests.low_rank.conftest import OPTIONS
from tests.refusals import line

GREEDY = SamplingParams(temperature=0, max_tokens=6)
ROOM = {"max_adapters": 2, "max_lora_rank": 8}  # as two adapters of rank 4 have it, so that programs are the same
TEXT = "some text that is long enough"


def request(name, folder, **more):
    """As vLLM's LoRARequest."""
    return SimpleNamespace(lora_name=name, lora_int_id=1, lora_path=str(folder), **more)


@pytest.fixture(scope="module")
def alone(llm):
    """What each gives, by name."""
    return {name: llm.generate(TEXT, GREEDY, adapter=name, use_tqdm=False)[0].outputs[0] for name in ("a", "b", None)}


def test_all_ways_to_generate(llm, alone):
    names = ["a", None, "b"]
    expected = [alone[name].token_ids for name in names]
    assert len({tuple(ids) for ids in expected}) == 3
    prompts = [{"prompt": TEXT, "adapter": name} for name in names]
    ways = [
        llm.generate([TEXT] * 3, GREEDY, adapter=names, use_tqdm=False),
        llm.generate(prompts, GREEDY, use_tqdm=False),
        list(llm.generate_iter(iter(prompts), GREEDY, in_order=True)),
        [
            *llm.generate_iter([TEXT], GREEDY, adapter="a"),
            *llm.generate_iter([TEXT, prompts[2]], GREEDY, in_order=True),
        ],
    ]
    for outputs in ways:
        assert [output.outputs[0].token_ids for output in outputs] == expected
    none = llm.generate({"prompt": TEXT, "adapter": None}, GREEDY, adapter="a", use_tqdm=False)[0]
    assert none.outputs[0].token_ids == alone[None].token_ids
    own = {"prompt": TEXT, "adapter": "b"}  # comes before what is said of all
    for output in (
        llm.generate(own, GREEDY, adapter="a", use_tqdm=False)[0],
        *llm.generate_iter([own], GREEDY, adapter="a"),
    ):
        assert output.outputs[0].token_ids == alone["b"].token_ids
    assert "".join(llm.stream(TEXT, GREEDY, adapter="a")) == alone["a"].text
    beams = llm.beam_search([TEXT] * 3, beam_width=1, max_tokens=6, adapter=names)
    assert [beam.sequences[0].token_ids for beam in beams] == expected
    chats = [llm.chat([{"role": "user", "content": "x"}], GREEDY, adapter=name, use_tqdm=False) for name in ("a", "b")]
    assert chats[0][0].outputs[0].token_ids != chats[1][0].outputs[0].token_ids
    stats = llm.stats
    assert stats.max_adapters == 2
    assert min(stats.adapter_tokens[name] for name in "ab") > 24
    assert (stats.running_adapters, stats.waiting_adapters) == ({}, {})


def test_scores(llm):
    a, none = llm.score([TEXT] * 2, adapter=["a", None], use_tqdm=False)
    assert a.logprob != none.logprob
    assert [output.logprob for output in llm.score_iter([TEXT], adapter="a")] == pytest.approx([a.logprob])
    assert llm.score("some", " text", adapter="b", use_tqdm=False)[0] != llm.score("some", " text", use_tqdm=False)[0]
    said = [{"prompt": "some", "adapter": "b"}, {"prompt": "some", "adapter": None}]
    own = [llm.score("some", " text", adapter=name, use_tqdm=False)[0].logprob for name in ("b", None)]
    outputs = llm.score(said, [" text"] * 2, adapter="a", use_tqdm=False)
    assert [output.logprob for output in outputs] == pytest.approx(own)
    assert llm.score({"prompt": TEXT, "adapter": "a"}, use_tqdm=False)[0].logprob == pytest.approx(a.logprob)
    assert "cache_salt" in line(lambda: llm.score({"prompt": TEXT, "cache_salt": "x"}, use_tqdm=False))
    rolling = llm.loglikelihood_rolling([TEXT] * 2, adapter=["a", None], use_tqdm=False)
    after_nothing = llm.score("", TEXT, adapter="a", use_tqdm=False)[0]
    assert rolling[0].logprobs == pytest.approx(after_nothing.logprobs, abs=1e-4)
    assert rolling[0].logprob != rolling[1].logprob


def test_requests_of_vllm_load_what_they_name(folders, alone):
    with LLM(folders / "base", enable_lora=True, max_loras=2, max_lora_rank=8, max_cpu_loras=4, **OPTIONS) as llm:
        assert llm.engine.adapters.most == 4
        asked = request("x", folders / "a")
        outputs = llm.generate([TEXT] * 2, GREEDY, lora_request=[asked, None], use_tqdm=False)
        assert [o.outputs[0].token_ids for o in outputs] == [alone["a"].token_ids, alone[None].token_ids]
        loaded = llm.engine.adapters.find("x")
        assert llm.score(TEXT, lora_request=asked, use_tqdm=False)[0].logprob != 0
        assert llm.engine.adapters.find("x") is loaded
        asked.lora_path = str(folders / "b")
        (output,) = llm.generate(TEXT, GREEDY, lora_request=asked, use_tqdm=False)
        assert output.outputs[0].token_ids == alone["b"].token_ids
        assert set(llm.list_adapters()) == {"x"}
        messages = [{"role": "user", "content": "x"}]
        assert llm.chat(messages, GREEDY, lora_request=asked, use_tqdm=False)[0].outputs[0].token_ids
        assert "it is adapter here, which is given too" in line(
            lambda: llm.chat(messages, GREEDY, lora_request=asked, adapter="x", use_tqdm=False)
        )
        for wrong, fact in [
            ("y", "adapter is 'y': there are x"),
            (5, "adapter is 5: it must be the name of one that is loaded"),
            (request("z", folders / "none"), "no such"),
            (request("x", folders / "b", load_inplace=True), "LLM.load_adapter(name, folder) reads one again"),
        ]:
            assert fact in line(lambda wrong=wrong: llm.generate(TEXT, GREEDY, lora_request=wrong))


def test_in_asyncio(folders, alone):
    async def ask():
        async with AsyncEngine(folders / "base", **ROOM, **OPTIONS) as engine:
            await engine.load_adapter("a", folders / "a")

            async def ids(prompt=TEXT, **adapter):
                return [o async for o in engine.generate(prompt, GREEDY, **adapter)][-1].outputs[0].token_ids

            found = await asyncio.gather(
                ids(adapter="a"),
                ids({"prompt": TEXT, "adapter": "a"}),
                ids(lora_request=request("b", folders / "b")),
                ids(),
            )
            assert set(engine.list_adapters()) == {"a", "b"}
            engine.unload_adapter("a")
            assert set(engine.list_adapters()) == {"b"}
            with pytest.raises(jaxinfer.RequestError, match="adapter is 'a': there are b"):
                await ids(adapter="a")
            return found

    assert asyncio.run(ask()) == [alone[name].token_ids for name in ("a", "a", "b", None)]


def test_in_one_call(folders, alone):
    try:
        options = {"adapters": {"a": folders / "a"}, **ROOM, **OPTIONS}
        texts = jaxinfer.generate(
            [TEXT] * 2, folders / "base", adapter=["a", None], temperature=0, max_tokens=6, **options
        )
        assert texts == [alone["a"].text, alone[None].text]
    finally:
        jaxinfer.unload()


def test_without_room(folders, tmp_path):
    with LLM(folders / "base", **OPTIONS) as llm:
        assert "load the model with max_adapters" in line(lambda: llm.load_adapter("a", folders / "a"))
    assert "max_lora_rank is 4, and there are no adapters" in line(lambda: LLM(folders / "base", max_lora_rank=4))


def test_one_that_was_not_trained_is_said(llm, folders, tmp_path, caplog):
    llm.load_adapter("idle", write_adapter(tmp_path / "idle", folders / "base", scale=0))
    llm.unload_adapter("idle")
    assert "changes nothing, all its lora_B are zeros" in caplog.text


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_scores_with_one(llm, folders):
    pytest.importorskip("lm_eval")
    from jaxinfer.lm_eval import JaxInferLM

    ids = llm.tokenizer.encode(TEXT)
    ((logprob, _),) = JaxInferLM(llm, adapter="a")._loglikelihood_tokens([(None, ids[:3], ids[3:])], disable_tqdm=True)
    assert logprob == pytest.approx(llm.score(ids[:3], ids[3:], adapter="a", use_tqdm=False)[0].logprob)
    assert "adapter is 'x': there are a, b" in line(lambda: JaxInferLM(llm, adapter="x"))
    assert "adapters is an option of loading" in line(lambda: JaxInferLM(llm, adapter=f"c={folders / 'c'}"))
