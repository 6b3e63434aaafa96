import contextlib
import json
import math
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from tokenizers import AddedToken, processors

from jaxinfer.text.base import Tokenizer
from jaxinfer.text.detokenize import Detokenizer
from jaxinfer.text.tokenizer import check_vocabulary, load_tokenizer

from .tiny import CORPUS, TEXTS, byte_level, sentencepiece_model, write

transformers = pytest.importorskip("transformers")


def oracle(folder: Path, kind: str = "AutoTokenizer") -> Any:
    return getattr(transformers, kind).from_pretrained(folder)


def assert_same(ours: Tokenizer, theirs: Any, texts: list[str]) -> None:
    for text in texts:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special), text
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), text
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1


# At a leading space transformers 5 leaves the dummy space out, unlike SentencePiece, which is what the model learned.
SP_TEXTS = [text for text in TEXTS if not text.startswith(" ")]
SPECIAL_TEXTS = ["<|begin|>a<|end|> b", "x<think>y", "<think>", "née x née", "<|pad|>"]


def test_tokenizer_json_as_transformers(llama3: Path) -> None:
    ours, theirs = load_tokenizer(llama3), oracle(llama3)
    theirs._tokenizer.no_padding()
    theirs._tokenizer.no_truncation()
    assert_same(ours, theirs, TEXTS + SPECIAL_TEXTS + CORPUS)
    assert ours.special_ids == set(theirs.all_special_ids) | {2}
    rng = random.Random(0)
    for _ in range(300):
        ids = [rng.randrange(ours.vocab_size + 5) for _ in range(rng.randrange(20))]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["json_bpe", "json_unigram", "wordpiece"])
def test_other_models_as_transformers(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    ours, theirs = load_tokenizer(folder), oracle(folder, "PreTrainedTokenizerFast")
    rng = random.Random(0)
    for _ in range(300):
        ids = [rng.randrange(ours.vocab_size) for _ in range(rng.randrange(20))]
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)


def test_stored_truncation_and_padding_are_off(llama3: Path) -> None:
    ids = load_tokenizer(llama3).encode("a longer text than five tokens")
    assert len(ids) > 5
    assert load_tokenizer(llama3).encode("a") == [0, *load_tokenizer(llama3).encode("a", add_special_tokens=False)]


def test_saved_again_by_transformers_5(llama3: Path, tmp_path: Path) -> None:
    theirs = oracle(llama3)
    theirs._tokenizer.no_padding()
    theirs._tokenizer.no_truncation()
    theirs.add_special_tokens({"extra_special_tokens": ["<|new|>"]})
    theirs.save_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    assert_same(ours, oracle(tmp_path), [*TEXTS, *SPECIAL_TEXTS, "a<|new|>b"])
    assert ours.encode("<|new|>", add_special_tokens=False)[0] in ours.special_ids


def test_files_of_transformers_4(tmp_path: Path) -> None:
    """special_tokens_map.json, added_tokens.json and a config without added_tokens_decoder."""
    tokenizer = byte_level(["<s>", "</s>"])
    size = tokenizer.get_vocab_size()
    write(
        tmp_path,
        tokenizer_config_json={"bos_token": "wrong", "tokenizer_class": "PreTrainedTokenizerFast"},
        special_tokens_map_json={
            "bos_token": {"content": "<s>", "lstrip": False, "rstrip": False},
            "eos_token": "</s>",
            "additional_special_tokens": ["<mark>"],
        },
        added_tokens_json={"<mark>": size, "<plain>": size + 1},
        config_json={"model_type": "llama"},
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    assert_same(ours, oracle(tmp_path), [*TEXTS, "b<plain>c</s>"])
    text = "a<mark>b<plain>c</s>"
    assert ours.encode(text) == oracle(tmp_path).encode(text)
    # transformers 5 forgets here that <mark> is special; transformers 4, which wrote such files, did not.
    assert ours.decode([size, size + 1]) == "<plain>"


@pytest.mark.parametrize("add_bos", [True, False, None])
def test_bos_of_tokenizer_json_is_its_post_processor(tmp_path: Path, add_bos: bool | None) -> None:
    tokenizer = byte_level(["<s>", "</s>"])
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": add_bos, "add_eos_token": True}
    write(tmp_path, tokenizer_config_json=config, config_json={"model_type": "llama"})
    template = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)])
    for post_processor, bos in ((template, [0]), (processors.ByteLevel(), [])):
        tokenizer.post_processor = post_processor
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        ours = load_tokenizer(tmp_path)
        assert ours.encode("hello") == [*bos, *ours.encode("hello", add_special_tokens=False)]
        assert ours.encode("hello") == oracle(tmp_path).encode("hello")


def test_gpt2_files_alone(gpt2: Path) -> None:
    ours = load_tokenizer(gpt2)
    assert_same(ours, oracle(gpt2), [*TEXTS, *CORPUS, "a<|endoftext|>b"])
    assert ours.bos_token_id == ours.eos_token_id == 0
    assert ours.special_ids == {0}


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "Qwen2Tokenizer"])
def test_vocabulary_and_merges_with_a_config(gpt2: Path, tmp_path: Path, kind: str) -> None:
    shutil.copytree(gpt2, tmp_path, dirs_exist_ok=True)
    size = len(json.loads((gpt2 / "vocab.json").read_text()))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "add_bos_token": True,
        "add_eos_token": True,
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "added_tokens_decoder": {
            "0": flags | {"content": "<|endoftext|>"},
            str(size): flags | {"content": "<|im_end|>", "rstrip": kind == "GPT2Tokenizer"},
        },
        "tokenizer_class": kind,
    }
    write(tmp_path, tokenizer_config_json=config, config_json={})
    ours = load_tokenizer(tmp_path)
    assert_same(ours, oracle(tmp_path, kind), [*TEXTS, *CORPUS, "a <|im_end|>  b", "Ａ e\u0301 12345\n\n x"])


def test_special_tokens_only_in_config_json(tmp_path: Path) -> None:
    """The oldest repositories have no tokenizer_config.json that names them."""
    byte_level(["<|endoftext|>"]).save(str(write(tmp_path) / "tokenizer.json"))
    assert load_tokenizer(tmp_path).eos_token_id is None
    write(tmp_path, config_json={"model_type": "gpt2", "bos_token_id": 0, "eos_token_id": [0, 5]})
    ours = load_tokenizer(tmp_path)
    assert (ours.bos_token_id, ours.eos_token_id) == (0, 0)


def test_sentencepiece_alone(sp_bpe: Path) -> None:
    ours, theirs = load_tokenizer(sp_bpe), oracle(sp_bpe, "LlamaTokenizer")
    assert (ours.bos_token_id, ours.eos_token_id, ours.special_ids) == (1, 2, {0, 1, 2})
    for text in [*SP_TEXTS, *CORPUS, "<s>a</s> b<unk>c", "[INST]</s><s> x"]:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == [1, *ids], text  # transformers 5 forgets Llama's BOS without a config
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), text


def test_sentencepiece_spaces_as_sentencepiece(sp_bpe: Path) -> None:
    ours = load_tokenizer(sp_bpe)
    model = sentencepiece.SentencePieceProcessor(model_file=str(sp_bpe / "tokenizer.model"))
    for text in TEXTS:
        assert ours.encode(text) == [1, *model.Encode(text)]
        assert ours.decode(model.Encode(text)) == text


def test_sentencepiece_with_added_tokens(sp_chat: Path) -> None:
    ours, theirs = load_tokenizer(sp_chat), oracle(sp_chat)
    texts = ["<|im_start|>user\n hi<|im_end|>\n<|im_start|>", "a <tool> b", "<tool><tool>", "<s> x</s>", "é<|im_end|>"]
    assert_same(ours, theirs, SP_TEXTS + CORPUS + texts)
    assert ours.special_ids == {i for i, token in theirs.added_tokens_decoder.items() if token.special}
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize("change", [{"legacy": True}, {"add_bos_token": False, "add_eos_token": None}])
def test_sentencepiece_flags(sp_chat: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    shutil.copytree(sp_chat, tmp_path, dirs_exist_ok=True)
    config = json.loads((sp_chat / "tokenizer_config.json").read_text()) | change
    write(tmp_path, tokenizer_config_json={key: value for key, value in config.items() if value is not None})
    assert_same(load_tokenizer(tmp_path), oracle(tmp_path), [*SP_TEXTS, "a<tool>b<tool>c"])


def test_sentencepiece_tokens_that_swallow_spaces(sp_chat: Path, tmp_path: Path) -> None:
    shutil.copytree(sp_chat, tmp_path, dirs_exist_ok=True)
    config = json.loads((sp_chat / "tokenizer_config.json").read_text())
    for i, token in enumerate(config["added_tokens_decoder"].values()):
        if token["content"][:2] == "<|":
            token.update(lstrip=i % 2 == 0, rstrip=i % 2 == 1)
        token["single_word"] = token["content"] == "<tool>"
    write(tmp_path, tokenizer_config_json=config)
    texts = ["a  <|im_start|>  b <|im_end|> \n c", "a<|im_end|>  <|im_start|>b", "x<tool> <tool> <tool>y"]
    assert_same(load_tokenizer(tmp_path), oracle(tmp_path), texts)


def test_sentencepiece_unigram_keeps_its_own_normalization(sp_unigram: Path) -> None:
    ours = load_tokenizer(sp_unigram)
    model = sentencepiece.SentencePieceProcessor(model_file=str(sp_unigram / "tokenizer.model"))
    for text in [*TEXTS, "ｈｅｌｌｏ  ①"]:
        assert ours.encode(text) == [1, *model.encode(text)]
        known = [i for i in model.encode(text) if i != model.unk_id()]
        assert ours.decode(known) == model.decode(known)


def test_ids_in_decode(gpt2: Path, sp_bpe: Path) -> None:
    for folder in (gpt2, sp_bpe):
        tokenizer = load_tokenizer(folder)
        ids = tokenizer.encode("hello world")
        assert tokenizer.decode(np.array(ids)) == "hello world"
        assert tokenizer.decode([*ids, tokenizer.vocab_size, 10**6]) == "hello world"
        with pytest.raises(ValueError, match="-1 is negative"):
            tokenizer.decode([-1])


def test_text_that_is_not_text(gpt2: Path, sp_bpe: Path) -> None:
    for folder in (gpt2, sp_bpe):
        tokenizer = load_tokenizer(folder)
        with pytest.raises(ValueError, match=r"U\+D800 at character 2"):
            tokenizer.encode("ab\ud800")
        with pytest.raises(ValueError, match="expected a string, found int"):
            tokenizer.encode(3)  # type: ignore[arg-type]


def test_check_vocabulary(gpt2: Path) -> None:
    tokenizer = load_tokenizer(gpt2)
    check_vocabulary(tokenizer, tokenizer.vocab_size)
    size = tokenizer.vocab_size
    with pytest.raises(ValueError, match=rf"ids up to {size - 1} but config.json says vocab_size {size - 1}"):
        check_vocabulary(tokenizer, size - 1)


def one_line_error(folder: Path, kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_no_tokenizer(tmp_path: Path) -> None:
    assert "no such folder" in one_line_error(tmp_path / "x", FileNotFoundError)
    message = one_line_error(tmp_path, FileNotFoundError)
    for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt"):
        assert name in message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b'{"version": ', "tokenizer.json: not valid JSON"),
        ("tokenizer.json", b"\xff\xfe", "tokenizer.json: not valid JSON"),
        ("tokenizer.json", b"", "tokenizer.json: not valid JSON"),
        ("tokenizer.json", b"{}", "tokenizer.json: not a tokenizer"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["x", "y"]]}}', "not a tokenizer"),
        ("tokenizer.model", b"", "tokenizer.model: not a SentencePiece model"),
        ("tokenizer.model", b"version https://git-lfs", "tokenizer.model: not a SentencePiece model"),
    ],
)
def test_corrupt_tokenizer(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert message in one_line_error(tmp_path)


def test_corrupt_companions(llama3: Path, gpt2: Path, sp_bpe: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama3, tmp_path / "a")
    path = folder / "tokenizer_config.json"
    cases = {
        "[": "not valid JSON",
        "[]": "expected a JSON object",
        '{"added_tokens_decoder": []}': "",
        '{"added_tokens_decoder": [1]}': "must map ids to tokens",
        '{"added_tokens_decoder": {"x": {"content": "a"}}}': "malformed entry 'x'",
        '{"added_tokens_decoder": {"9999": {"content": "<new>"}}}': "'<new>' has id 9999 there but",
        '{"additional_special_tokens": "a"}': "must be a list",
        '{"clean_up_tokenization_spaces": "yes"}': "must be true or false",
        '{"chat_template": 3}': "chat_template must be a string",
    }
    for content, message in cases.items():
        path.write_text(content)
        if message:
            assert message in one_line_error(folder)
        else:
            load_tokenizer(folder)
    folder = shutil.copytree(gpt2, tmp_path / "b")
    (folder / "merges.txt").write_text("not in vocabulary\n")
    assert "Merges text file invalid at line 1); download them again: vocab.json, merges.txt" in one_line_error(folder)
    (folder / "vocab.json").write_text("{")
    assert "vocab.json: not valid JSON" in one_line_error(folder)
    folder = shutil.copytree(sp_bpe, tmp_path / "c")
    proto = (folder / "tokenizer.model").read_bytes()
    (folder / "tokenizer.model").write_bytes(proto[: len(proto) // 2])
    assert "not a SentencePiece model" in one_line_error(folder)
    write(folder, added_tokens_json={"<x>": "y"})
    (folder / "tokenizer.model").write_bytes(proto)
    assert "expected token -> id" in one_line_error(folder)


HOSTILE = (-1, 2**31, 10**30, 1.5, True, None, "8", [], {}, math.nan, math.inf)


def test_ids_that_can_not_be(llama3: Path, sp_bpe: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sp_bpe, tmp_path / "a")
    for value in HOSTILE:
        write(folder, added_tokens_json={"<x>": value})
        assert "added_tokens.json: expected token -> id, found '<x>': " in one_line_error(folder)
    (folder / "added_tokens.json").unlink()
    for key in ("-1", "2147483648", "9" * 5000, "1.5", "NaN", "٣", ""):
        write(folder, tokenizer_config_json={"added_tokens_decoder": {key: {"content": "<x>"}}})
        assert "added_tokens_decoder has a malformed entry" in one_line_error(folder)
    write(folder, tokenizer_config_json={"added_tokens_decoder": {"400": "<x>"}})
    assert load_tokenizer(folder).decode([400], skip_special_tokens=False) == "<x>"
    folder = shutil.copytree(llama3, tmp_path / "b")
    content = json.loads((folder / "tokenizer.json").read_text())
    for value in HOSTILE:
        for changed in (
            {"added_tokens": [content["added_tokens"][0] | {"id": value}]},
            {"model": content["model"] | {"vocab": content["model"]["vocab"] | {"<x>": value}}},
        ):
            write(folder, tokenizer_json=content | changed)
            with contextlib.suppress(ValueError):  # it may be a vocabulary all the same: ids are u32 there
                load_tokenizer(folder)


def test_a_giant_id_takes_no_memory(llama3: Path, sp_bpe: Path, tmp_path: Path) -> None:
    """There is no set, list or array of all ids up to the largest."""
    first, second, third = (shutil.copytree(f, tmp_path / n) for f, n in ((llama3, "a"), (sp_bpe, "b"), (sp_bpe, "c")))
    content = json.loads((first / "tokenizer.json").read_text())
    content["model"]["vocab"]["<x>"] = 2**31 - 1
    write(first, tokenizer_json=content)
    write(second, added_tokens_json={"<x>": 2**31 - 1})
    write(third, tokenizer_config_json={"added_tokens_decoder": {str(2**31 - 1): {"content": "<x>"}}})
    for folder in (first, second, third):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        tokenizer = load_tokenizer(folder)
        assert tokenizer.encode("hello <x>")
        ids = [1, 2**31 - 2, 2**31 - 1]
        detokenizer = Detokenizer(tokenizer, skip_special_tokens=False)
        assert detokenizer.push(ids) + detokenizer.finish() == tokenizer.decode(ids, skip_special_tokens=False)
        assert tokenizer.token_text(2**31 - 1) == "<x>"
        with pytest.raises(ValueError, match=r"ids up to 2147483647 but config.json says vocab_size 400;"):
            check_vocabulary(tokenizer, 400)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17  # KiB


def test_mutated_tokenizer_json(json_unigram: Path, llama3: Path, tmp_path: Path, capfd: Any) -> None:
    """Whatever happened to the file: a tokenizer or a ValueError of one line."""
    rng = random.Random(0)
    for folder in (json_unigram, llama3):
        content = (folder / "tokenizer.json").read_bytes()
        for _ in range(100):
            start = rng.randrange(len(content))
            junk = bytes(rng.choice(b'0123456789{}[]",:nul\xff-') for _ in range(rng.randrange(4)))
            (tmp_path / "tokenizer.json").write_bytes(content[:start] + junk + content[start + rng.randrange(6) :])
            try:
                load_tokenizer(tmp_path).decode(load_tokenizer(tmp_path).encode("hello é"))
            except ValueError as error:
                assert "\n" not in str(error)  # noqa: PT017
    capfd.readouterr()  # a panic in Rust writes to stderr


def test_no_heavy_import(llama3: Path, sp_chat: Path) -> None:
    code = f"""
import sys
from jaxinfer.text.tokenizer import load_tokenizer
from jaxinfer.text.detokenize import Detokenizer
for folder in {[str(llama3), str(sp_chat)]}:
    tokenizer = load_tokenizer(folder)
    Detokenizer(tokenizer).push(tokenizer.encode("hello"))
    tokenizer.encoding("hello", "world")
print([name for name in ("torch", "transformers", "jax", "google.protobuf") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_user_defined_pieces(tmp_path: Path) -> None:
    sentencepiece_model(tmp_path / "tokenizer.model", user_defined_symbols=["<|user|>"])
    ours = load_tokenizer(tmp_path)
    ids = ours.encode("hi<|user|>there")
    assert ours.decode(ids) == "hi<|user|>there"
    (user,) = ours.encode("<|user|>", add_special_tokens=False)[-1:]
    assert user in ids
    assert user not in ours.special_ids


@pytest.mark.parametrize("role", ["eos_token", "pad_token", "named", "listed", "none"])
@pytest.mark.parametrize("flagged_again", [False, True])
def test_what_has_a_role_is_special_whatever_its_flag(tmp_path: Path, role: str, flagged_again: bool) -> None:
    """As in transformers, which goes by the flag for tokens that tokenizer_config.json only lists."""
    tokenizer = byte_level(["<s>"])
    flags = {"lstrip": False, "rstrip": True, "single_word": False, "normalized": False, "special": False}
    tokenizer.add_tokens([AddedToken("<|im_end|>", **flags)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config: dict[str, Any] = {
        "named": {"extra_special_tokens": {"end_token": "<|im_end|>"}},
        "listed": {"extra_special_tokens": ["<|im_end|>"]},
        "none": {},
    }.get(role, {role: "<|im_end|>"})
    if flagged_again:
        token_id = tokenizer.token_to_id("<|im_end|>")
        config["added_tokens_decoder"] = {str(token_id): {"content": "<|im_end|>"} | flags}
    write(tmp_path, tokenizer_config_json=config, config_json={"model_type": "llama"})
    ours, theirs = load_tokenizer(tmp_path), oracle(tmp_path, "PreTrainedTokenizerFast")
    text = "a <|im_end|> b<|im_end|>c"
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ("<|im_end|>" in ours.decode(ids)) == (role in ("listed", "none"))


def test_what_has_a_role_is_special_in_sentencepiece_too(sp_chat: Path, tmp_path: Path) -> None:
    for file in sp_chat.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for token in config["added_tokens_decoder"].values():
        token["special"] = False
    write(tmp_path, tokenizer_config_json=config)
    before, after = load_tokenizer(sp_chat), load_tokenizer(tmp_path)
    ids = before.encode("<|im_start|>hello<|im_end|>")
    assert after.encode("<|im_start|>hello<|im_end|>") == ids
    assert after.decode(ids) == "<|im_start|>hello"  # which has no role there
