"""Tokenizers of folders without tokenizer.json, beside transformers' own classes, sentencepiece and tokenizers."""

import random
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import normalizers

from jaxinfer.errors import RequestError
from jaxinfer.text.base import Tokenizer
from jaxinfer.text.detokenize import Detokenizer
from jaxinfer.text.encoding import Encoding, Truncation
from jaxinfer.text.legacy import _KINDS
from jaxinfer.text.tokenizer import load_tokenizer

from .folders import KINDS, SCRIPTS, texts
from .tiny import write

transformers = pytest.importorskip("transformers")
from transformers.convert_slow_tokenizer import SentencePieceExtractor  # noqa: E402
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES  # noqa: E402

# What Python tokenizers say of "</s>" in a text, and of a package that they don't use.
pytestmark = pytest.mark.filterwarnings("ignore:This sequence already has", "ignore:Recommended")
# Those classes of transformers 5 that leave the model's own normalization of characters out.
FORGETFUL = ("BigBirdTokenizer", "DebertaV2Tokenizer", "MBartTokenizer")
QUICK = 250
SLOW = 10_000


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, folder in made.items():
        KINDS[kind][0](folder)
    return made


def oracle(folder: Path, name: str) -> Any:
    theirs = getattr(transformers, name).from_pretrained(folder)
    if name in FORGETFUL:
        (model,) = folder.glob("*.model")
        characters = normalizers.Precompiled(
            SentencePieceExtractor(str(model)).proto.normalizer_spec.precompiled_charsmap
        )
        own = theirs.backend_tokenizer.normalizer
        theirs.backend_tokenizer.normalizer = normalizers.Sequence([characters, own] if own else [characters])
    return theirs


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def ours(folders: dict[str, Path], kind: str) -> Tokenizer:
    return load_tokenizer(folders[kind])


@pytest.fixture
def theirs(folders: dict[str, Path], kind: str) -> Any:
    return oracle(folders[kind], KINDS[kind][1])


def special_texts(theirs: Any) -> list[str]:
    tokens = [token.content for token in theirs.added_tokens_decoder.values()][:12]
    return [template.format(token) for token in tokens for template in ("{0}", "a {0} b", "a{0}b", "  {0}  {0}")] + [
        "a </s>"
    ]


def assert_same(ours: Tokenizer, theirs: Any, count: int) -> None:
    for text in [*texts(count), *special_texts(theirs)]:
        for special in (True, False):
            ids = ours.encode(text, special)
            assert ids == theirs.encode(text, add_special_tokens=special, verbose=False), text
        for skip in (True, False):
            ids = ours.encode(text)
            whole = ours.decode(ids, skip)
            assert whole == theirs.decode(ids, skip_special_tokens=skip), text
            detokenizer = Detokenizer(ours, skip)
            assert "".join(detokenizer.push([i]) for i in ids) + detokenizer.finish() == whole, text
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.known_ids == set(theirs.get_vocab().values())


def test_ids_and_decoding(ours: Tokenizer, theirs: Any) -> None:
    assert_same(ours, theirs, QUICK)


@pytest.mark.slow
def test_ids_and_decoding_of_many_texts(ours: Tokenizer, theirs: Any) -> None:
    assert_same(ours, theirs, SLOW)


def test_texts_are_of_many_kinds() -> None:
    made = texts(SLOW)
    assert len(SCRIPTS) > 40
    assert all(any(first <= ord(char) <= last for text in made for char in text) for first, last in SCRIPTS.values())
    assert "" in made
    assert max(map(len, made)) > 10_000


def test_any_ids_stream_to_the_whole(ours: Tokenizer, theirs: Any) -> None:
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(ours.vocab_size + 3) for _ in range(rng.randrange(25))]
        if ours.token_bytes is not None and rng.random() < 0.5:
            ids += ours.encode(rng.choice(texts(300))[:8], add_special_tokens=False)
        known = [i for i in ids if i in ours.known_ids]
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(known, skip_special_tokens=skip)
            cut = rng.randrange(len(ids) + 1)
            for prompt, rest in (([], ids), (ids[:cut], ids[cut:])):
                detokenizer = Detokenizer(ours, skip, prompt)
                text = "".join(detokenizer.push([i]) for i in rest) + detokenizer.finish()
                before, both = ours.decode(prompt, skip), ours.decode(ids, skip)
                assert before + text == both or not both.startswith(before)


def truncations(count: int) -> Iterator[tuple[str, str | None, Truncation | None]]:
    rng = random.Random(1)
    several = [text[:200] for text in texts(count)]
    for text in several:
        second = rng.choice([None, rng.choice(several)]) or None  # "" is no second text for transformers
        strategy = rng.choice(["longest_first", "only_first"] + ["only_second"] * (second is not None))
        side = rng.choice(["right", "left"])
        truncation = Truncation(rng.randint(4, 40), strategy, side, rng.randint(0, 3))
        yield text, second, rng.choice([truncation, truncation, truncation, None])


def their_windows(theirs: Any, first: str, second: str | None, truncation: Truncation | None) -> list[Encoding]:
    options: dict[str, Any] = {"return_special_tokens_mask": True, "verbose": False}
    if truncation is not None:
        theirs.truncation_side = truncation.side
        options |= {"truncation": truncation.strategy, "max_length": truncation.max_length}
        options |= {"stride": truncation.stride, "return_overflowing_tokens": theirs.is_fast}
    encoded = theirs(first, second, **options)
    if theirs.is_fast:
        return [
            Encoding(e.ids, e.type_ids, e.special_tokens_mask, e.sequence_ids, e.offsets, e.word_ids)
            for e in encoded.encodings
        ]
    sequences = [None] * len(encoded.input_ids)
    return [Encoding(encoded.input_ids, [], encoded.special_tokens_mask, sequences, None, None)]


def assert_same_windows(ours: Tokenizer, theirs: Any, count: int) -> None:
    windows = refused = 0
    for first, second, truncation in truncations(count):
        try:
            mine = list(ours.windows(first, second, truncation))
        except RequestError:
            refused += 1
            continue
        other = their_windows(theirs, first, second, truncation)
        by_turns = truncation is not None and truncation.strategy == "longest_first" and second is not None
        if not theirs.is_fast:
            # Of two texts that are as long, other than elsewhere the second loses the odd token.
            assert by_turns or mine[0].ids == other[0].ids
            assert by_turns or mine[0].special_tokens_mask == other[0].special_tokens_mask
            continue
        if "token_type_ids" not in theirs.model_input_names:  # then they are not the same in all windows
            other = [other[0], *(replace(e, type_ids=m.type_ids) for e, m in zip(other[1:], mine[1:], strict=False))]
        assert mine[0] == other[0] == ours.encoding(first, second, truncation), (first, second, truncation)
        assert by_turns or mine == other, (first, second, truncation)
        windows += len(mine) > 1
    assert refused < count / 4
    assert windows > count / 10 or not theirs.is_fast


def test_encodings(ours: Tokenizer, theirs: Any) -> None:
    assert_same_windows(ours, theirs, QUICK)


@pytest.mark.parametrize("layout", ["llama3", "json_bpe", "json_unigram"])
def test_encodings_of_tokenizer_json(layout: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(layout)
    theirs = oracle(folder, "PreTrainedTokenizerFast")
    theirs.backend_tokenizer.no_padding()
    assert_same_windows(load_tokenizer(folder), theirs, QUICK)


@pytest.mark.slow
def test_many_encodings(ours: Tokenizer, theirs: Any) -> None:
    assert_same_windows(ours, theirs, SLOW)


def of_sentencepiece(kind: str, folder: Path) -> Any:
    """The ids that sentencepiece itself has for a text, in the order of the class's vocabulary."""
    (model,) = (path for path in folder.iterdir() if path.suffix == ".model")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    if kind in ("t5", "deberta"):
        return processor.encode
    return lambda text: [i + 1 if i else 3 for i in processor.encode(text)]


def simple(text: str) -> str:
    """Without what becomes one character with others, where the same normalization differs in `tokenizers`."""
    joined = [range(first, last + 1) for first, last in (SCRIPTS["Jamo"], SCRIPTS["Ligatures"])]
    kept = (c for c in text if unicodedata.category(c) not in ("Mn", "Mc", "Cc", "Cf") or c in "\t\n\r")
    return "".join(c for c in kept if not any(ord(c) in characters for characters in joined)).strip()


@pytest.mark.parametrize("kind", ["xlm_roberta", "mbart", "nllb", "t5", "deberta"])
@pytest.mark.parametrize("count", [QUICK, pytest.param(SLOW, marks=pytest.mark.slow)])
def test_ids_are_sentencepiece_s(folders: dict[str, Path], kind: str, count: int) -> None:
    ours, expected = load_tokenizer(folders[kind]), of_sentencepiece(kind, folders[kind])
    compared = 0
    for text in filter(None, map(simple, texts(count))):
        compared += 1
        assert ours.encode(text, add_special_tokens=False) == expected(text), text
    assert compared > count * 0.9


def test_normalization_of_the_model(folders: dict[str, Path]) -> None:
    for kind in ("xlm_roberta", "mbart", "nllb", "t5", "deberta"):
        ours = load_tokenizer(folders[kind])
        assert ours.encode("ｈｅｌｌｏ") == ours.encode("hello"), kind


def same_files(name: str) -> str:
    return next(kind for kind, (_, of) in KINDS.items() if set(_KINDS[of].files) == set(_KINDS[name].files))


@pytest.mark.parametrize("name", [name for name in _KINDS if name not in {name for _, name in KINDS.values()}])
def test_other_classes(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Those that read the same files as one of the folders."""
    source = {"BigBirdTokenizer": "t5", "PegasusTokenizer": "t5", "MPNetTokenizer": "bert"}.get(name) or same_files(
        name
    )
    for file in _KINDS[name].files:
        (tmp_path / file).write_bytes((folders[source] / file).read_bytes())
    write(tmp_path, tokenizer_config_json={"tokenizer_class": name}, config_json={})
    ours, theirs = load_tokenizer(tmp_path), oracle(tmp_path, name)
    assert_same(ours, theirs, 60)
    assert_same_windows(ours, theirs, 60)


def test_model_types_are_transformers_own() -> None:
    for name, kind in _KINDS.items():
        for model in kind.models:
            theirs = getattr(transformers, TOKENIZER_MAPPING_NAMES[model])
            assert issubclass(theirs, getattr(transformers, kind.name or name)), model


def test_windows_cover_the_text(folders: dict[str, Path]) -> None:
    ours = load_tokenizer(folders["bert"])
    context = "the quick brown fox jumps over the lazy dog " * 5
    for side in ("right", "left"):
        windows = list(ours.windows("hello", context, Truncation(20, "only_second", side, 4)))
        whole = ours.encoding("hello", context)
        assert len(windows) > 3
        spans = [
            [offset for offset, of in zip(window.offsets or [], window.sequence_ids, strict=True) if of == 1]
            for window in windows
        ]
        if side == "left":
            spans.reverse()
        assert all(before[-4:] == after[:4] for before, after in pairwise(spans))
        joined = spans[0] + [offset for span in spans[1:] for offset in span[4:]]
        assert joined == [o for o, of in zip(whole.offsets or [], whole.sequence_ids, strict=True) if of == 1]
