"""The tokenizer: whole words in sentences, single letters in quotation marks, the same for all that read it."""

import itertools
import json
from pathlib import Path

import pytest

from jaxinfer.demo.questions import held_out_questions, training_questions
from jaxinfer.demo.tokenizer import BOS_ID, EOS_ID, UNK_ID, load_tokenizer
from jaxinfer.demo.train import TOKENIZER_CONFIG, tokenizer_for_families


@pytest.fixture(scope="module")
def serialized() -> bytes:
    return tokenizer_for_families()


@pytest.fixture(scope="module")
def texts() -> list[str]:
    questions = [*held_out_questions(500), *itertools.islice(training_questions(1), 2000)]
    odd = ['"Zoë" said\n 「こんにちは」', "", "  two  spaces ", "\n", "tabs\tand▁marks", "a" * 300]
    return [q.text for q in questions] + [q.answer for q in questions] + odd


def test_words_are_whole_and_quoted_letters_are_single(serialized):
    tokenizer = load_tokenizer(serialized)
    assert tokenizer.encode('Reverse the word "letters".', out_type=str) == [
        *["▁Reverse", "▁the", "▁word", '▁"', "l", "e", "t", "t", "e", "r", "s", '"', "."]
    ]
    assert tokenizer.encode("What is 27 + 45?", out_type=str) == [
        *["▁What", "▁is", "▁", "2", "7", "▁+", "▁", "4", "5", "?"]
    ]
    assert tokenizer.encode("forty-five", out_type=str) == ["▁forty", "-five"]
    assert tokenizer.encode("what", out_type=str) == ["▁what"]


def test_encoding_is_reversible(serialized, texts):
    tokenizer = load_tokenizer(serialized)
    for text in texts:
        ids = tokenizer.encode(text)
        assert UNK_ID not in ids
        assert tokenizer.decode(ids) == text.replace("▁", " ")  # SentencePiece's own limit


def test_the_file_is_what_sentencepiece_takes_it_for(serialized):
    tokenizer = load_tokenizer(serialized)
    assert tokenizer.unk_id() == UNK_ID
    assert tokenizer.bos_id() == BOS_ID
    assert tokenizer.eos_id() == EOS_ID
    assert tokenizer.pad_id() == -1
    pieces = [tokenizer.id_to_piece(i) for i in range(tokenizer.vocab_size())]
    assert len(set(pieces)) == len(pieces)
    assert all(tokenizer.is_byte(3 + byte) for byte in range(256))
    assert tokenizer_for_families() == serialized


def test_transformers_reads_the_same_ids(serialized, texts, tmp_path: Path):
    pytest.importorskip("google.protobuf")
    transformers = pytest.importorskip("transformers")
    (tmp_path / "tokenizer.model").write_bytes(serialized)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = load_tokenizer(serialized)
    for text in texts:
        if not text.startswith(" ") and text:  # transformers puts no second space before these
            assert theirs.encode(text) == [BOS_ID, *ours.encode(text)]
