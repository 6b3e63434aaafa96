"""Structured output: every text matches what it was to match, in any company."""

import dataclasses
import json
import re
import threading

import jsonschema
import numpy as np
import pytest

from jaxinfer import LLM, RequestError, SamplingParams
from jaxinfer.engine import engine
from jaxinfer.engine.guided import guides
from jaxinfer.engine.guided.grammar import grammar_of
from jaxinfer.engine.runner import Runner
from tests.engine.schemas import Maker, sweep
from tests.settled import settled

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "ü"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMS = {
    "json": PERSON,
    "regex": r"[0-9]{3}-[a-f]{2,4}",
    "choice": ["yes", "no", "yes and no", "日本"],
    "grammar": 'root ::= "(" item ("," item)* ")"\nitem ::= [a-c] | "(" item ")"',
    "json_object": True,
}
OPTIONS = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "page_size": 8}  # as in test_features: the same programs


def asked(form, **more):
    fields = {"temperature": 1.0, "max_tokens": 64, "structured_outputs": {form: FORMS[form]}} | more
    return SamplingParams(**fields)


def prompt(seed):
    return np.random.default_rng(seed).integers(0, 250, 3 + seed % 40).tolist()


def check(form, completion):
    """A text that has ended matches; one that was cut begins well."""
    text = completion.text
    if completion.finish_reason == "length":
        assert form in ("json", "json_object", "grammar")
        return
    assert completion.finish_reason == "stop"
    match form:
        case "json":
            jsonschema.validate(json.loads(text), PERSON)
        case "json_object":
            assert isinstance(json.loads(text), dict)
        case "choice":
            assert text in FORMS["choice"]
        case "regex":
            assert re.fullmatch(FORMS["regex"], text)
        case "grammar":
            assert re.fullmatch(r"\(\(*[a-c]\)*(,\(*[a-c]\)*)*\)", text)
            assert text.count("(") == text.count(")")


@pytest.fixture(scope="module")
def llm(checkpoints):
    with LLM(checkpoints("llama").folder, **OPTIONS) as llm:
        yield llm
        settled(llm)
        assert llm.stats.pages_used == 0


def tokens(outputs):
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


@pytest.fixture(scope="module")
def mixed():
    """Prompts and parameters: guided and plain ones, with all that may meet a grammar."""
    params = [asked(form, seed=i) for i in range(3) for form in FORMS]
    params[0] = asked("json", seed=0, logprobs=3, max_tokens=128)
    params[1] = asked("regex", seed=1, n=3, repetition_penalty=1.2)
    params[2] = asked("choice", seed=2, bad_words=["yes"], temperature=0.0)
    params[3] = asked("grammar", seed=2, no_repeat_ngram_size=4, max_tokens=12)
    for at, more in ((4, {}), (8, {"bad_words": ["ab", "c d"]})):
        params.insert(at, SamplingParams(temperature=1.0, seed=at, max_tokens=30, ignore_eos=True, **more))
    return [prompt(i) for i in range(len(params))], params


@pytest.fixture(scope="module")
def alone(llm, mixed):
    return [llm.generate(p, q, use_tqdm=False)[0] for p, q in zip(*mixed, strict=True)]


def test_every_text_matches(alone, mixed):
    ended = 0
    for output, params in zip(alone, mixed[1], strict=True):
        assert output.error is None
        for completion in output.outputs if params.structured_outputs is not None else ():
            check(params.structured_outputs.kind, completion)
            ended += completion.finish_reason == "stop"
    assert ended >= 12
    assert "yes" not in alone[2].outputs[0].text


def test_company_changes_nothing(llm, mixed, alone):
    assert tokens(llm.generate(*mixed, use_tqdm=False)) == tokens(alone)
    streamed = list(llm.stream(mixed[0][0], mixed[1][0]))
    assert "".join(streamed) == alone[0].outputs[0].text


def test_forced_tokens_are_the_same(llm, mixed, alone, monkeypatch):
    """Where a grammar leaves no choice, tokens go through as a prompt's do, in fewer calls."""
    schema = {"properties": {name: {"enum": ["left", "right"]} for name in ("first", "second")}, "required": ["second"]}
    call = asked(
        "json", seed=0, structured_outputs={"json": schema | {"type": "object"}, "disable_any_whitespace": True}
    )

    def generated():
        before = llm.stats.calls
        output = llm.generate([1, 2, 3], call, use_tqdm=False)
        return tokens(output), llm.stats.calls - before

    with monkeypatch.context() as patch:
        patch.setattr(engine, "forced_tokens", lambda *_: [])
        expected, usual = generated()
    monkeypatch.setattr(Runner, "on_cpu", False)
    assert generated()[0] == expected
    assert generated()[1] < usual / 2
    assert tokens(llm.generate(*mixed, use_tqdm=False)) == tokens(alone)


@pytest.mark.slow
def test_preempted_ones_go_on(checkpoints, mixed, alone):
    with LLM(
        checkpoints("llama").folder, kv_cache_memory=15 * 8 * 2 * 2 * 2 * 8 * 4, max_model_len=112, **OPTIONS
    ) as llm:
        assert tokens(llm.generate(*mixed, use_tqdm=False)) == tokens(alone)
        assert llm.stats.preemptions > 0


@pytest.mark.slow
def test_a_mesh_changes_nothing(checkpoints, mixed, alone):
    with LLM(checkpoints("llama").folder, mesh="data=2,tensor=2", **OPTIONS) as llm:
        assert tokens(llm.generate(*mixed, use_tqdm=False)) == tokens(alone)


@pytest.mark.slow
def test_random_schemas(llm):
    """All keywords: a text that ends validates. tests/engine/schemas.py does it with more."""
    counts = sweep(llm, [Maker(i).schema() for i in range(150)])
    assert counts["INVALID"] == 0
    assert counts["valid"] > 100


def test_log_probabilities_are_the_model_s(llm, mixed, alone):
    """Of all tokens, not of those that the grammar leaves."""
    (output,) = alone[0].outputs
    whole = mixed[0][0] + output.token_ids
    scored = llm.generate(whole, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)[0].prompt_logprobs
    theirs = [scored[i][token].logprob for i, token in enumerate(whole) if i >= len(mixed[0][0])]
    ours = [step[token].logprob for step, token in zip(output.logprobs, output.token_ids, strict=True)]
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_log_probabilities_of_the_prompt(llm):
    """Also where the text is there before they are."""
    params = SamplingParams(structured_outputs={"choice": ["a"]}, prompt_logprobs=1)
    for length in (3, 70):
        (output,) = llm.generate(prompt(length)[:2] * length, params, use_tqdm=False)
        assert output.outputs[0].text == "a"
        assert len(output.prompt_logprobs) == 2 * length


def test_ends(llm):
    """The end of the grammar is that of the text, whatever else says so; a stop string comes before it."""
    only = {"structured_outputs": {"choice": ["abcdef"]}, "max_tokens": 20, "temperature": 0.0}
    for more in ({}, {"ignore_eos": True}, {"min_tokens": 12}, {"stop_token_ids": [3]}):
        completion = llm.generate([5, 6], SamplingParams(**only, **more), use_tqdm=False)[0].outputs[0]
        assert (completion.text, completion.finish_reason) == ("abcdef", "stop")
    cut = llm.generate([5, 6], SamplingParams(**only, stop="d"), use_tqdm=False)[0].outputs[0]
    assert (cut.text, cut.stop_reason) == ("abc", "d")
    short = llm.generate([5, 6], SamplingParams(**(only | {"max_tokens": 4})), use_tqdm=False)[0].outputs[0]
    assert (short.text, short.finish_reason) == ("abcd", "length")
    eos = llm.tokenizer.eos_token_id
    open_end = SamplingParams(structured_outputs={"regex": "a+"}, logit_bias={eos: 1e9}, max_tokens=9, temperature=0.0)
    assert llm.generate([5], open_end, use_tqdm=False)[0].outputs[0].token_ids[1:] == [eos]
    later = open_end.with_changes(min_tokens=3)
    assert llm.generate([5], later, use_tqdm=False)[0].outputs[0].text == "aaa"
    never = open_end.with_changes(ignore_eos=True)
    assert llm.generate([5], never, use_tqdm=False)[0].outputs[0].text == "a" * 9


def test_none_is_left(llm):
    """Where another parameter excludes what the grammar needs: an error of the request alone, or before it runs."""
    b = llm.tokenizer.encode("b")[0]
    broken = SamplingParams(structured_outputs={"choice": ["abc"]}, suppress_tokens=[b], temperature=0.0)
    fine = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    one, other = llm.generate([[5], [6]], [broken, fine], use_tqdm=False)
    assert "structured_outputs" in one.error
    assert one.outputs[0].finish_reason == "error"
    assert one.outputs[0].text == "a"
    assert other.error is None
    with pytest.raises(RequestError, match="leave no token to begin with"):
        llm.generate([5], SamplingParams(structured_outputs={"choice": ["bc"]}, suppress_tokens=[b]), use_tqdm=False)


@pytest.mark.parametrize(("form", "begin"), [("json", "{"), ("choice", "n")])
def test_after_a_text(llm, form, begin):
    """What comes before it is free, and it may end within a token."""
    params = asked(form, structured_outputs={form: FORMS[form], "after": "</t>"}, max_tokens=40, seed=3)
    bias = {llm.tokenizer.encode(character)[0]: 40.0 for character in "</t>"}
    begun = llm.engine.check([1], params)[2]
    for text, fine in (("free < text</t>", True), (f"</t>\n\n{begin}", True), ("</t>#", False)):
        ids = llm.tokenizer.encode(text)
        assert (begun.anew().matcher.try_consume_tokens(ids) == len(ids)) == fine
    completion = llm.generate([5], params.with_changes(logit_bias=bias), use_tqdm=False)[0].outputs[0]
    _, end, answer = completion.text.partition("</t>")
    if end and completion.finish_reason == "stop":
        check(form, dataclasses.replace(completion, text=answer.strip()))
    else:
        assert completion.finish_reason == "length"


@pytest.mark.parametrize("after", [None, "</t>"])
def test_unless_a_text_begins_otherwise(llm, after):
    params = SamplingParams(structured_outputs={"choice": ["yes", "no"], "unless": ["<call>"], "after": after})
    begun = llm.engine.check([1], params)[2]
    for text, fine, complete in (
        ("yes", True, True),
        ("<call>whatever < it is\n</call> and <call>", True, False),
        ("<cal", True, False),
        ("maybe", False, False),
        ("<calm>", False, False),
    ):
        guide, ids = begun.anew(), llm.tokenizer.encode(f"free{after}\n{text}" if after else text)
        assert (guide.matcher.try_consume_tokens(ids) == len(ids)) == fine
        if fine:
            assert guide.matcher.is_accepting() == (text != "<cal")
            assert guide.matcher.is_stopped() == complete
    bias = {llm.tokenizer.encode(character)[0]: 40.0 for character in "<call>"} if after is None else {}
    completion = llm.generate([5], params.with_changes(max_tokens=30, logit_bias=bias, seed=3), use_tqdm=False)[
        0
    ].outputs[0]
    assert completion.finish_reason in ("stop", "length")
    assert after or completion.text.startswith(("yes", "no", "<call>"))


def test_who_waits_for_a_grammar(llm, monkeypatch):
    """Who asks for it, and nobody else: the engine's thread goes on."""
    begun, over = threading.Event(), threading.Event()

    def slow(*of):
        begun.set()
        assert over.wait(60)
        return grammar_of(*of)

    monkeypatch.setattr(guides, "grammar_of", slow)
    texts = []

    def ask():
        params = SamplingParams(structured_outputs={"choice": ["a new one"]})
        texts.append(llm.generate([5], params, use_tqdm=False)[0].outputs[0].text)

    thread = threading.Thread(target=ask)
    thread.start()
    assert begun.wait(60)
    assert llm.generate([5, 6], SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)[0].finished
    assert not texts
    over.set()
    thread.join()
    assert texts == ["a new one"]
