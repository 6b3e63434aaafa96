"""OpenAI's own client."""

import openai
import pytest

from jaxinfer import SamplingParams
from tests.settled import settled

MESSAGES = [{"role": "user", "content": "hello there"}]


@pytest.fixture
def ai(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models(ai):
    assert [model.id for model in ai.models.list()] == ["tiny", "other"]
    assert ai.models.retrieve("other").owned_by == "jaxinfer"
    with pytest.raises(openai.NotFoundError) as caught:
        ai.models.retrieve("a/b")
    assert caught.value.code == "model_not_found"


def test_a_chat_is_what_the_model_says_streamed_or_not(ai, served_llm):
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=20, n=2, logprobs=2)
    (expected,) = served_llm.chat(MESSAGES, params, use_tqdm=False)
    asked = {"model": "tiny", "messages": MESSAGES, "temperature": 0.8, "seed": 3, "max_completion_tokens": 20, "n": 2}
    asked |= {"logprobs": True, "top_logprobs": 2}
    answer = ai.chat.completions.create(**asked)
    texts, reasons = [""] * 2, [None] * 2
    logprobs = [[], []]
    usage = None
    for chunk in ai.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        assert chunk.id.startswith("chatcmpl-")
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
            logprobs[choice.index] += choice.logprobs.content if choice.logprobs else []
    for i, output in enumerate(expected.outputs):
        choice = answer.choices[i]
        assert choice.message.content == texts[i] == output.text
        assert choice.finish_reason == reasons[i] == output.finish_reason
        assert choice.logprobs.content == logprobs[i]
        assert len(logprobs[i]) == len(output.token_ids)
    assert usage.completion_tokens == sum(len(output.token_ids) for output in expected.outputs)
    assert answer.usage.prompt_tokens == usage.prompt_tokens == len(expected.prompt_token_ids)
    settled(served_llm)


def test_completions_of_several_prompts(ai, served_llm):
    prompts = ["abc", "de fg"]
    expected = served_llm.generate(prompts, SamplingParams(temperature=0, max_tokens=9, logprobs=1), use_tqdm=False)
    asked = {"model": "tiny", "prompt": prompts, "temperature": 0, "max_tokens": 9, "logprobs": 1}
    answer = ai.completions.create(**asked)
    assert [choice.text for choice in answer.choices] == [output.outputs[0].text for output in expected]
    texts = ["", ""]
    for chunk in ai.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in answer.choices]
    ids = expected[0].prompt_token_ids
    again = ai.completions.create(
        model="tiny", prompt=ids, temperature=0, max_tokens=9, extra_body={"return_token_ids": True}
    )
    assert again.choices[0].text == texts[0]
    assert again.choices[0].prompt_token_ids == ids


def test_echo_is_what_lm_eval_asks_for(ai, served_llm):
    (expected,) = served_llm.generate(
        ["abc de"], SamplingParams(temperature=0, max_tokens=1, logprobs=1, prompt_logprobs=1), use_tqdm=False
    )
    answers = [ai.completions.create(model="tiny", prompt="abc de", temperature=0, max_tokens=1, logprobs=1, echo=True)]
    answers += ai.completions.create(
        model="tiny", prompt="abc de", temperature=0, max_tokens=1, logprobs=1, echo=True, stream=True
    )
    first, streamed = answers[0].choices[0], answers[1].choices[0]
    assert first.text == "abc de" + expected.outputs[0].text
    assert streamed.text.startswith("abc de")
    assert first.logprobs.token_logprobs[0] is None
    assert len(first.logprobs.tokens) == len(expected.prompt_token_ids) + 1
    scored = [
        step[i].logprob for i, step in zip(expected.prompt_token_ids[1:], expected.prompt_logprobs[1:], strict=True)
    ]
    assert first.logprobs.token_logprobs[1:-1] == pytest.approx(scored, abs=1e-5)


def test_a_prompt_that_was_there_is_told_as_cached(ai):
    asked = {"model": "tiny", "prompt": "once more " * 8, "max_tokens": 2}
    first, second = (ai.completions.create(**asked).usage for _ in range(2))
    assert second.prompt_tokens_details.cached_tokens > first.prompt_tokens_details.cached_tokens


def test_errors_are_the_clients_own(ai):
    with pytest.raises(openai.BadRequestError) as caught:
        ai.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=10**6)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "max_tokens")
    with pytest.raises(openai.NotFoundError):
        ai.chat.completions.create(model="none", messages=MESSAGES)
