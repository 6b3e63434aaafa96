"""A request's tokens become text, and it ends where it should, without a device."""

import pytest

from jaxinfer import SamplingParams
from jaxinfer.engine.generation import SequenceOutput
from jaxinfer.engine.request import Request
from jaxinfer.text.base import Tokenizer
from jaxinfer.text.tokenizer import load_tokenizer
from tests.text.tiny import json_bpe_tokenizer

EOS, WORD, LETTER = 2, "▁hello", "s"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A byte is a token where there is no other: a newline is."""
    return load_tokenizer(json_bpe_tokenizer(tmp_path_factory.mktemp("tokenizer") / "json_bpe"))


def generate(tokenizer: Tokenizer, tokens: list[int], **params) -> tuple[SequenceOutput, list[str]]:
    """The generation after `tokens`, as far as it took them, one a call, and its text as a stream has it."""
    asked = SamplingParams(**{"max_tokens": 100} | params)
    prompt = tokenizer.encode("hello")
    request = Request(
        id=0,
        prompt_length=len(prompt),
        tokens=prompt,
        params=asked,
        seed=0,
        stop_ids=(EOS,),
        limit=len(prompt) + asked.max_tokens,
    )
    generation = SequenceOutput(request, tokenizer)
    pieces = []
    for token in tokens:
        shown = generation.text
        generation.accept([token], None, 0)
        assert generation.text.startswith(shown)
        pieces.append(generation.text[len(shown) :])
        if generation.finished:
            break
    return generation, pieces


def ended(generation: SequenceOutput) -> tuple[str, int, str | None, int | str | None]:
    completion = generation.completion()
    return completion.text, len(completion.token_ids), completion.finish_reason, completion.stop_reason


def ids(tokenizer: Tokenizer, *tokens: str) -> list[int]:
    return [tokenizer._tokenizer.token_to_id("<0x0A>" if token == "\n" else token) for token in tokens]


def test_a_newline_that_is_a_byte_token_is_seen_at_once(tokenizer):
    newline, word = ids(tokenizer, "\n", WORD)
    assert ended(generate(tokenizer, [newline, word], stop="\n")[0]) == ("", 1, "stop", "\n")
    assert ended(generate(tokenizer, [newline], stop="\n", max_tokens=1)[0]) == ("", 1, "stop", "\n")
    assert ended(generate(tokenizer, [newline] * 9, stop="\n\n")[0]) == ("", 2, "stop", "\n\n")
    assert generate(tokenizer, [newline, newline, word, EOS])[1] == ["\n", "\n", " hello", ""]


def test_text_goes_on_where_the_prompt_ends(tokenizer):
    (word,) = ids(tokenizer, WORD)
    assert ended(generate(tokenizer, [word, word, EOS])[0]) == (" hello hello", 3, "stop", None)
    assert ended(generate(tokenizer, [word], stop=" ")[0]) == ("", 1, "stop", " ")
    assert ended(generate(tokenizer, [word], stop=" hel")[0]) == ("", 1, "stop", " hel")


def test_a_stop_string_that_begins_before_min_tokens(tokenizer):
    word, letter = ids(tokenizer, WORD, LETTER)
    for min_tokens in (0, 1, 2, 3):
        generation, pieces = generate(tokenizer, [word, letter, letter, word], stop="loss", min_tokens=min_tokens)
        if min_tokens < 3:
            assert ended(generation) == (" hel", 3, "stop", "loss")
            assert pieces == [" hel", "", ""]
        else:  # it was complete too early
            assert (generation.text, generation.finished) == (" helloss hel", False)
    # Complete before and once more after.
    assert ended(generate(tokenizer, [word, word, word], stop="hello", min_tokens=1)[0]) == (
        " hello ",
        2,
        "stop",
        "hello",
    )


def test_a_stop_string_that_the_end_completes(tokenizer):
    """Half a character is shown when nothing more can come, and the text is cut there."""
    word, byte = ids(tokenizer, WORD)[0], 3 + 0xE2
    for last, params in (([byte], {"max_tokens": 2}), ([byte, EOS], {})):
        generation, _ = generate(tokenizer, [word, *last], stop=["o\ufffd"], **params)
        assert ended(generation) == (" hell", 1 + len(last), "stop", "o\ufffd")
        assert ended(generate(tokenizer, [word, *last], min_tokens=2, stop=["o\ufffd"], **params)[0]) == (
            (" hello\ufffd", 2, "length", None) if params else (" hell", 3, "stop", "o\ufffd")
        )


def test_what_a_stop_token_says_may_complete_a_stop_string(tokenizer):
    (word,) = ids(tokenizer, WORD)
    params = {"include_stop_str_in_output": True, "skip_special_tokens": False, "stop": "hello</s>"}
    assert ended(generate(tokenizer, [word, EOS], **params)[0]) == (" hello</s>", 2, "stop", "hello</s>")
