import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxinfer.text.detokenize import Detokenizer
from jaxinfer.text.tokenizer import Tokenizer, load_tokenizer

from .tiny import write

KINDS = [
    "llama3",
    "gpt2",
    "sp_bpe",
    "sp_unigram",
    "sp_chat",
    "json_bpe",
    "json_unigram",
    "wordpiece",
    "looks_ahead",
    "no_decoder",
]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return load_tokenizer(request.getfixturevalue(request.param))


def stream(tokenizer: Tokenizer, ids: list[int], skip: bool, size: int) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip)
    pieces = [detokenizer.push(ids[i : i + size]) for i in range(0, len(ids), size)]
    pieces.append(detokenizer.finish())
    assert detokenizer.text == "".join(pieces)
    return pieces


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), skip=st.booleans(), size=st.integers(1, 4))
def test_any_ids_concatenate_to_the_whole_text(tokenizer: Tokenizer, data: Any, skip: bool, size: int) -> None:
    any_id = st.integers(0, tokenizer.vocab_size + 3)  # a few that the tokenizer doesn't know
    ids = data.draw(st.lists(any_id, max_size=30))
    # Byte tokens are where it is hard: mix real characters' bytes in.
    if tokenizer.byte_values and data.draw(st.booleans()):
        of_byte = {byte: i for i, byte in tokenizer.byte_values.items()}
        text = data.draw(st.text(max_size=6)).encode()
        cut = data.draw(st.integers(0, len(text)))
        ids = [*ids, *[of_byte[b] for b in text[:cut]], *data.draw(st.lists(any_id, max_size=3))]
    pieces = stream(tokenizer, ids, skip, size)
    assert "".join(pieces) == tokenizer.decode(ids, skip)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=20), size=st.integers(1, 3))
def test_real_text_never_shows_half_a_character(tokenizer: Tokenizer, text: str, size: int) -> None:
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids)
    pieces = stream(tokenizer, ids, True, size)
    assert "".join(pieces) == whole
    for piece in pieces:
        assert piece.count("\ufffd") <= whole.count("\ufffd")


def test_cleanup_across_tokens(json_unigram: Path) -> None:
    """All texts of five of the clean-up's own characters: each replacement can feed the next."""
    tokenizer = load_tokenizer(json_unigram)
    assert tokenizer.cleans_up
    inner = settings(max_examples=2000, deadline=None)

    @inner
    @given(st.lists(st.integers(3, tokenizer.vocab_size - 1), max_size=25))
    def check(ids: list[int]) -> None:
        assert "".join(stream(tokenizer, ids, True, 1)) == tokenizer.decode(ids)

    check()
    assert tokenizer.decode(tokenizer.encode("a 's .")) == "a's."


def test_bytes_are_held_until_the_character_is_whole(sp_bpe: Path, json_bpe: Path, gpt2: Path) -> None:
    for folder in (sp_bpe, gpt2):
        tokenizer = load_tokenizer(folder)
        detokenizer = Detokenizer(tokenizer)
        ids = tokenizer.encode("xẞ", add_special_tokens=False)
        assert "".join(detokenizer.push([i]) for i in ids[:-1]) == "x"
        assert detokenizer.push(ids[-1:]) == "ẞ"
    # tokenizers turns a whole run of byte tokens into U+FFFD if any of it is invalid: only the run's end is certain.
    tokenizer = load_tokenizer(json_bpe)
    detokenizer = Detokenizer(tokenizer)
    hello, *_ = tokenizer.encode("hello", add_special_tokens=False)
    run = [3 + byte for byte in "ẞ".encode()]
    assert [detokenizer.push([i]) for i in [hello, *run]] == ["hello", "", "", ""]
    assert detokenizer.push([hello]) == "ẞ hello"
    assert [detokenizer.push(run[:2]), detokenizer.finish()] == ["", "\ufffd\ufffd"]


def test_plain_tokens_are_released_at_once(llama3: Path, sp_bpe: Path, json_bpe: Path, wordpiece: Path) -> None:
    for folder in (llama3, sp_bpe, json_bpe, wordpiece):
        tokenizer = load_tokenizer(folder)
        assert not tokenizer.looks_ahead
    tokenizer = load_tokenizer(sp_bpe)
    detokenizer = Detokenizer(tokenizer)
    ids = tokenizer.encode("hello world", add_special_tokens=False)
    shown = ""
    for i in range(len(ids)):
        shown += detokenizer.push(ids[i : i + 1])
        assert shown == tokenizer.decode(ids[: i + 1])


def test_leading_space_and_special_tokens(sp_chat: Path) -> None:
    tokenizer = load_tokenizer(sp_chat)
    ids = tokenizer.encode("<|im_start|> hello<tool> é<|im_end|>")
    assert "".join(stream(tokenizer, ids, True, 1)) == "hello<tool> é"
    assert "".join(stream(tokenizer, ids, False, 1)) == "<s><|im_start|> hello<tool> é<|im_end|><|im_end|>"


def test_finish_twice_and_push_after_finish(gpt2: Path) -> None:
    detokenizer = Detokenizer(load_tokenizer(gpt2))
    detokenizer.push([0])
    detokenizer.finish()
    assert detokenizer.finish() == ""
    with pytest.raises(ValueError, match="push after finish"):
        detokenizer.push([0])


@pytest.mark.parametrize("kind", ["llama3", "sp_bpe", "json_bpe", "json_unigram"])
def test_cost_of_a_token_does_not_grow(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = load_tokenizer(request.getfixturevalue(kind))
    ids = [i for i in range(tokenizer.vocab_size) if i not in tokenizer.byte_values] * 200

    def seconds(count: int) -> float:
        best = float("inf")
        for _ in range(3):
            detokenizer = Detokenizer(tokenizer)
            start = time.perf_counter()
            for i in ids[:count]:
                detokenizer.push([i])
            best = min(best, time.perf_counter() - start)
        return best / count

    few, many = seconds(200), seconds(4000)
    assert many < 3 * few  # re-decoding the text would be 20 times the cost
    assert many < 100e-6


@pytest.mark.parametrize("kind", ["json_bpe", "sp_bpe"])
def test_ids_that_no_token_has(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """They give no text, so they don't end a run of bytes either."""
    folder = shutil.copytree(request.getfixturevalue(kind), tmp_path, dirs_exist_ok=True)
    hole = load_tokenizer(folder).vocab_size
    if kind == "json_bpe":
        content = json.loads((folder / "tokenizer.json").read_text())
        content["model"]["vocab"]["far"] = hole + 1
        write(folder, tokenizer_json=content)
    else:
        write(folder, added_tokens_json={"far": hole + 1})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocab_size == hole + 2
    of_byte = {byte: i for i, byte in tokenizer.byte_values.items()}
    ids = [hole + 1, *[i for byte in "ẞ".encode() for i in (of_byte[byte], hole)], hole + 1]
    assert tokenizer.decode(ids) == "farẞfar"
    assert "".join(stream(tokenizer, ids, True, 1)) == "farẞfar"
