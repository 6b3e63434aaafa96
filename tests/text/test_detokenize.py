import json
import re
import shutil
import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers.decoders import DecodeStream

from jaxinfer.text.base import Tokenizer
from jaxinfer.text.detokenize import Detokenizer
from jaxinfer.text.hf import HFTokenizer
from jaxinfer.text.tokenizer import load_tokenizer

from .tiny import write

KINDS = [
    "llama3",
    "gpt2",
    "sp_bpe",
    "sp_unigram",
    "sp_chat",
    "json_bpe",
    "json_at_start",
    "json_unigram",
    "wordpiece",
    "looks_ahead",
    "no_decoder",
]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return load_tokenizer(request.getfixturevalue(request.param))


def stream(
    tokenizer: Tokenizer, ids: list[int], skip: bool = True, size: int = 1, prompt: Sequence[int] = ()
) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip, prompt)
    pieces = [detokenizer.push(ids[i : i + size]) for i in range(0, len(ids), size)]
    pieces.append(detokenizer.finish())
    assert detokenizer.text == "".join(pieces)
    return pieces


def any_ids(tokenizer: Tokenizer, data: Any) -> list[int]:
    any_id = st.integers(0, tokenizer.vocab_size + 3)  # a few that the tokenizer doesn't know
    ids = data.draw(st.lists(any_id, max_size=30))
    # Byte tokens are where it is hard: mix real characters' bytes in.
    if tokenizer.byte_values and data.draw(st.booleans()):
        of_byte = {byte: i for i, byte in tokenizer.byte_values.items()}
        text = data.draw(st.text(max_size=6)).encode()
        cut = data.draw(st.integers(0, len(text)))
        ids = [*ids, *[of_byte[b] for b in text[:cut]], *data.draw(st.lists(any_id, max_size=3))]
    return ids


def whole(tokenizer: Tokenizer, ids: list[int], skip: bool) -> str:
    """`tokenizer.decode`, but in a run of byte tokens what is no character is U+FFFD byte by byte, whatever stands
    beside it."""
    text = tokenizer.decode(ids, skip)
    if not isinstance(tokenizer, HFTokenizer) or not tokenizer.byte_values or "\ufffd" not in text:
        return text
    kept = [i for i in ids if i in tokenizer.known_ids - (tokenizer.special_ids if skip else set())]
    tokens: list[str] = []
    for is_byte, run in groupby(kept, tokenizer.byte_values.__contains__):
        if is_byte:
            characters = bytes(tokenizer.byte_values[i] for i in run).decode(errors="surrogateescape")
            tokens += re.sub("[\udc80-\udcff]", "\ufffd", characters)
        else:
            tokens += [tokenizer._tokenizer.id_to_token(i) for i in run]
    return tokenizer._tokenizer.decoder.decode(tokens)


EXAMPLES = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@EXAMPLES
@given(data=st.data(), skip=st.booleans(), size=st.integers(1, 4))
def test_any_ids_concatenate_to_the_whole_text(tokenizer: Tokenizer, data: Any, skip: bool, size: int) -> None:
    ids = any_ids(tokenizer, data)
    assert "".join(stream(tokenizer, ids, skip, size)) == whole(tokenizer, ids, skip)


@EXAMPLES
@given(data=st.data(), skip=st.booleans(), size=st.integers(1, 4))
def test_text_continues_any_prompt(tokenizer: Tokenizer, data: Any, skip: bool, size: int) -> None:
    prompt, ids = any_ids(tokenizer, data), any_ids(tokenizer, data)
    before, both = whole(tokenizer, prompt, skip), whole(tokenizer, prompt + ids, skip)
    text = "".join(stream(tokenizer, ids, skip, size, prompt))
    if both.startswith(before):
        assert before + text == both
    elif not tokenizer.cleans_up:
        # The prompt's last bytes have become a character.
        kept = both.removesuffix(text)
        assert before.startswith(kept)
        assert before[len(kept) :] in ("\ufffd", "\ufffd\ufffd", "\ufffd\ufffd\ufffd")


@pytest.mark.parametrize("kind", ["llama3", "gpt2", "json_bpe", "json_anywhere", "json_unigram"])
def test_text_continues_a_prompt_as_a_stream_of_tokenizers(kind: str, request: pytest.FixtureRequest) -> None:
    """vLLM gives the prompt and then the output to such a stream."""
    tokenizer = load_tokenizer(request.getfixturevalue(kind))
    assert isinstance(tokenizer, HFTokenizer)
    tokenizer.cleans_up = False  # which the stream does not do
    words = ["hello", " ", "  ", " hello", "\n", "é", " 日本", "🙂", ".", "a", "<s>"]
    texts = st.lists(st.sampled_from(words), max_size=8)

    @settings(max_examples=300, deadline=None)
    @given(texts.map("".join), st.integers(0, 40), st.booleans())
    def check(text: str, cut: int, skip: bool) -> None:
        ids = tokenizer.encode(text)
        assume("\ufffd" not in tokenizer.decode(ids[:cut]))
        theirs = DecodeStream(skip_special_tokens=skip)
        pieces = [theirs.step(tokenizer._tokenizer, i) or "" for i in ids]
        assert "".join(stream(tokenizer, ids[cut:], skip, 1, ids[:cut])) == "".join(pieces[cut:])

    check()


def test_the_first_word_after_a_prompt_keeps_its_space(sp_bpe: Path, sp_unigram: Path, json_bpe: Path) -> None:
    for folder in (sp_bpe, sp_unigram, json_bpe):
        tokenizer = load_tokenizer(folder)
        ids = tokenizer.encode("hello hello")
        end = len(tokenizer.encode("hello"))
        assert "".join(stream(tokenizer, ids[end:], prompt=ids[:end])) == " hello"
        assert "".join(stream(tokenizer, ids[end:], prompt=[1])) == "hello"  # BOS is no text, unless it is shown
        assert "".join(stream(tokenizer, ids[end:], False, prompt=[1])) == " hello"
        # However much comes between the text and its continuation.
        assert "".join(stream(tokenizer, ids[end:], prompt=[*ids[:end], *[2] * 100])) == " hello"


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
    # And not until the run of byte tokens ends, though tokenizers would make U+FFFD of a run in which any is invalid.
    tokenizer = load_tokenizer(json_bpe)
    detokenizer = Detokenizer(tokenizer)
    hello, *_ = tokenizer.encode("hello", add_special_tokens=False)
    run = [3 + byte for byte in "ẞ\n".encode()]
    assert [detokenizer.push([i]) for i in [hello, *run]] == ["hello", "", "", "ẞ", "\n"]
    assert [detokenizer.push([i]) for i in [run[1], run[3]]] == ["\ufffd", "\n"]
    assert [detokenizer.push(run[:2]), detokenizer.push([hello])] == ["", "\ufffd\ufffd hello"]
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


def test_decoders_with_regular_expressions_hold_no_text_back(json_at_start: Path, json_anywhere: Path) -> None:
    for folder in (json_at_start, json_anywhere):
        tokenizer = load_tokenizer(folder)
        ids = tokenizer.encode("hello hello\nẞ.", add_special_tokens=False)
        assert stream(tokenizer, ids) == ["hello", " hello", "\n", "", "", "ẞ", ".", ""]
        # Bytes that are no character are shown all the same, and soon.
        pieces = stream(tokenizer, [3 + 255] * 20, prompt=ids)
        assert "".join(pieces) == "\ufffd" * 20
        assert max(map(len, pieces)) <= 5


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
    assert many < 8 * few  # re-decoding the text would be 20 times the cost; other work on the machine can be 4 times


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
