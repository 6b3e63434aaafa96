"""Folders without tokenizer.json that are not as they should be: an error of one line, and nothing of theirs is run."""

import inspect
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxinfer import LLM, SamplingParams
from jaxinfer.checkpoint.contents import beside, files_of
from jaxinfer.text.base import NoTokenizer
from jaxinfer.text.encoding import Truncation
from jaxinfer.text.legacy import _FIXED, _KINDS, _OPTIONS, VOCABULARIES
from jaxinfer.text.tokenizer import has_tokenizer, load_tokenizer
from tests.refusals import change, line

from .folders import KINDS
from .tiny import write

transformers = pytest.importorskip("transformers")


@pytest.fixture
def folder_of(tmp_path: Path) -> Callable[[str], Path]:
    def make(kind: str) -> Path:
        folder = tmp_path / kind
        folder.mkdir()
        KINDS[kind][0](folder)
        return folder

    return make


def refused(folder: Path, *facts: object) -> str:
    text = line(lambda: load_tokenizer(folder))
    assert all(str(fact) in text for fact in (folder, *facts)), text
    return text


@pytest.mark.parametrize("kind", [kind for kind in KINDS if _KINDS[KINDS[kind][1]].files])
def test_a_missing_file(folder_of: Callable[[str], Path], kind: str) -> None:
    folder = folder_of(kind)
    name = KINDS[kind][1]
    for file in _KINDS[name].files:
        content = (folder / file).read_bytes()
        (folder / file).unlink()
        others = [other for other in _KINDS[name].files if other != file]
        if others:
            assert has_tokenizer(folder)
            refused(folder, name, f"{file} is not there", "copy it")
        else:
            assert not has_tokenizer(folder)
            assert file in line(lambda: load_tokenizer(folder), FileNotFoundError)
        (folder / file).write_bytes(content)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 791656\n"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if _KINDS[KINDS[kind][1]].files])
@pytest.mark.parametrize("content", [b"", POINTER, b"\xff\xfe\x00", b"{", "half"])
def test_a_broken_file(folder_of: Callable[[str], Path], kind: str, content: bytes | str, capfd: Any) -> None:
    folder = folder_of(kind)
    for file in _KINDS[KINDS[kind][1]].files:
        whole = (folder / file).read_bytes()
        end = {"merges.txt": whole.rfind(b" "), "vocab.txt": whole.rfind(b"\n", 0, len(whole) // 2) + 1}
        half = whole[: end.get(file, len(whole) // 2)]
        (folder / file).write_bytes(half if content == "half" else content)
        if file == "vocab.txt" and content == "half" and kind == "bert":
            load_tokenizer(folder)  # fewer words are a vocabulary too: it is for `check_vocabulary` to say
        elif (file, content) != ("merges.txt", b""):
            text = refused(folder)
            assert (file in text and "download" in text) or (content == "half" and "take all" in text), text
        (folder / file).write_bytes(whole)
    load_tokenizer(folder)
    shown = capfd.readouterr()
    assert "thread" in shown.err or not shown.err  # what Rust itself says of a panic


def test_mutated_files(folder_of: Callable[[str], Path], capfd: Any) -> None:
    rng = random.Random(0)
    for kind in ("bert_cased", "roberta", "t5", "marian", "nllb"):
        folder = folder_of(kind)
        for file in sorted(folder.iterdir()):
            whole = file.read_bytes()
            for _ in range(12):
                start = rng.randrange(len(whole))
                junk = bytes(rng.choice(b'0123456789{}[]",:nul\xff-') for _ in range(rng.randrange(4)))
                file.write_bytes(whole[:start] + junk + whole[start + rng.randrange(6) :])
                try:
                    tokenizer = load_tokenizer(folder)
                    tokenizer.decode(tokenizer.encode("hello é"))
                except ValueError as error:
                    assert "\n" not in str(error)  # noqa: PT017
            file.write_bytes(whole)
    capfd.readouterr()


@pytest.mark.parametrize(
    "name", ["EsmTokenizer", "QWenTokenizer", "os.system", "../x", "", "__class__", "PreTrainedTokenizer"]
)
def test_an_unknown_class(folder_of: Callable[[str], Path], name: str) -> None:
    folder = folder_of("bert")
    write(folder, tokenizer_config_json={"tokenizer_class": name}, config_json={"model_type": "bert"})
    refused(folder, "tokenizer_config.json", f"{name!r} is none that is known", "tokenizer.json", "tokenizer=PATH")


@pytest.mark.parametrize("value", [3, None, [], {}, True])
def test_a_class_that_is_no_name(folder_of: Callable[[str], Path], value: Any) -> None:
    folder = folder_of("bert")
    write(folder, tokenizer_config_json={"tokenizer_class": value}, config_json={})
    refused(folder, "nothing says whose tokenizer vocab.txt is", "tokenizer_class", "model_type")
    write(folder, config_json={"model_type": ["bert"]})
    refused(folder, "nothing says whose")
    write(folder, config_json={"model_type": "bert"})
    assert load_tokenizer(folder).encode("hello")
    write(folder, config_json={"tokenizer_class": "BertTokenizerFast"})
    assert load_tokenizer(folder).encode("hello")


def test_code_of_a_checkpoint_is_never_run(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = folder_of("bert")
    (folder / "tokenization_mine.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w').close()\n")
    auto_map = {"AutoTokenizer": ["tokenization_mine.MyTokenizer", None]}
    for own in ("MyTokenizer", "BertTokenizer"):
        write(folder, tokenizer_config_json={"tokenizer_class": own, "auto_map": auto_map, "trust_remote_code": True})
        if own == "MyTokenizer":
            refused(folder, "'MyTokenizer'", "auto_map", "never run", "tokenizer.json")
        else:
            assert load_tokenizer(folder).encode("hello")
    assert not (tmp_path / "was-run").exists()


def test_paths_in_options_are_not_followed(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    """An audit hook sees every file that is opened."""
    secret = tmp_path / "secret"
    secret.write_text("[UNK]\n")
    paths = [
        "vocab",
        "vocab_file",
        "merges",
        "merges_file",
        "tokenizer_file",
        "tokenizer_object",
        "gguf_file",
        "name_or_path",
    ]
    paths += [
        "source_spm",
        "target_spm",
        "target_vocab_file",
        "normalizer_file",
        "spm_file",
        "init_inputs",
        "cache_dir",
    ]
    options: dict[str, Any] = dict.fromkeys(paths, str(secret))
    code = f"""
import sys, pathlib
opened = []
sys.addaudithook(lambda event, arguments: event == "open" and opened.append(str(arguments[0])))
from jaxinfer.text.tokenizer import load_tokenizer
for folder in sys.argv[1:]:
    load_tokenizer(pathlib.Path(folder)).encode("hello")
assert any("vocab.txt" in name for name in opened) or any("tokenizer_config.json" in name for name in opened)
assert {str(secret)!r} not in opened, opened
print([name for name in ("torch", "jax") if name in sys.modules])
"""
    folders = []
    for kind in KINDS:
        folders.append(str(folder_of(kind)))
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            path = Path(folders[-1], file)
            change_or_write(path, options)
    done = subprocess.run(
        [sys.executable, "-c", code, *folders],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert (done.returncode, done.stderr, done.stdout.strip()) == (0, "", "[]")


def change_or_write(path: Path, options: dict[str, Any]) -> None:
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(options | old))


@pytest.mark.parametrize(
    ("kind", "option", "value"),
    [
        ("bert", "do_basic_tokenize", False),
        ("bert", "never_split", ["a"]),
        ("bert", "split_special_tokens", True),
        ("marian", "sp_model_kwargs", {"enable_sampling": True, "alpha": 0.1}),
        ("bert", "do_lower_case", "yes"),
        ("bert", "strip_accents", 1),
        ("t5", "extra_ids", 10**9),
        ("byt5", "extra_ids", -1),
        ("byt5", "extra_ids", 2000),
        ("t5", "extra_ids", True),
        ("mbart", "src_lang", ["en_XX"]),
        ("mbart", "src_lang", "xx_XX"),
        ("nllb", "src_lang", "fra_Latn"),
        ("whisper", "task", "sing"),
        ("bert", "unk_token", "<nothing>"),
        ("bert", "mask_token", 5),
        ("bert", "mask_token", {"content": "[MASK]", "of": "x"}),
        ("bert", "added_tokens_decoder", {"5000": {"content": "<far>"}}),
        ("t5", "added_tokens_decoder", {"5": {"content": "<moved>"}}),
    ],
)
def test_options_that_can_not_be(folder_of: Callable[[str], Path], kind: str, option: str, value: Any) -> None:
    folder = folder_of(kind)
    if not (folder / "tokenizer_config.json").exists():
        write(folder, tokenizer_config_json={})
    change(folder, "tokenizer_config.json", **{option: value})
    refused(folder)


@pytest.mark.parametrize("kind", ["bert", "byt5", "gpt2", "marian", "t5"])
def test_null_is_as_if_it_were_not_there(folder_of: Callable[[str], Path], kind: str) -> None:
    folder = folder_of(kind)
    text = "Hello <extra_id_1> World"
    usual = load_tokenizer(folder).encode(text)
    path = folder / "tokenizer_config.json"
    change_or_write(path, dict.fromkeys(["added_tokens_decoder", "do_lower_case", "extra_ids", "extra_special_tokens"]))
    assert load_tokenizer(folder).encode(text) == usual


def test_all_options_of_the_classes_are_known() -> None:
    """Those of their constructors, but for files, what files hold, and what changes no token."""
    none = {"self", "args", "kwargs", "vocab", "merges", "vocab_file", "source_spm", "target_spm", "target_vocab_file"}
    none |= {"errors", "model_max_length", "normalizer_file", "unk_id", "_spm_precompiled_charsmap"}
    for name in _KINDS:
        options = inspect.signature(getattr(transformers, name).__init__).parameters.keys() - none
        tokens = {option for option in options if option.endswith(("_token", "_special_tokens"))}
        assert options - tokens <= _OPTIONS.keys() | _FIXED.keys(), name


def test_options_of_bert(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("bert")
    seen = set()
    for options in ({}, {"do_lower_case": False}, {"strip_accents": False}, {"tokenize_chinese_chars": False}):
        write(folder, tokenizer_config_json={"tokenizer_class": "BertTokenizer"} | options)
        ids = load_tokenizer(folder).encode("The Éé hello日本")
        assert ids == transformers.BertTokenizer.from_pretrained(folder).encode("The Éé hello日本")
        seen.add(tuple(ids))
    assert len(seen) == 4


def test_nllb_without_ids_of_its_languages(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("nllb")
    write(folder, tokenizer_config_json={"tokenizer_class": "NllbTokenizer", "additional_special_tokens": ["eng_Latn"]})
    refused(folder, "languages", "added_tokens_decoder")


def test_truncation_that_can_not_be(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder_of("bert"))
    for wrong in (0, -1, True, 2.0, "5", None):
        assert "max_length" in line(lambda wrong=wrong: Truncation(wrong))
    for options, fact in (
        ({"strategy": "shortest"}, "longest_first"),
        ({"side": "up"}, "left"),
        ({"stride": -1}, "stride"),
    ):
        assert fact in line(lambda options=options: Truncation(5, **options))
    for call, facts in (
        (lambda: tokenizer.encoding("hello world", truncation=Truncation(1)), ("max_length", "2 special tokens")),
        (lambda: tokenizer.encoding("a", "hello " * 9, Truncation(8, "only_first")), ("only_first", "longest_first")),
        (lambda: tokenizer.encoding("hello " * 9, truncation=Truncation(8, "only_second")), ("only_second", "pairs")),
        (lambda: list(tokenizer.windows("hello " * 9, truncation=Truncation(8, stride=6))), ("stride", "6 tokens")),
        (lambda: tokenizer.encoding("a", "\ud800"), ("U+D800",)),
    ):
        text = line(call)
        assert all(fact in text for fact in facts), text
    nothing = NoTokenizer(tmp_path, "the folder has none")
    assert nothing.encoding([5, 6, 7], truncation=Truncation(2)).ids == [5, 6]
    assert "needs a tokenizer" in line(lambda: nothing.encoding([5], [6]))
    assert "needs a tokenizer" in line(lambda: nothing.encoding("a"))


def test_ids_as_input(folder_of: Callable[[str], Path]) -> None:
    for kind in ("bert", "roberta", "marian"):
        tokenizer = load_tokenizer(folder_of(kind))
        first, second = (tokenizer.encode(text, add_special_tokens=False) for text in ("hello world", "the fox"))
        of_ids, of_text = tokenizer.encoding(first, second), tokenizer.encoding("hello world", "the fox")
        assert of_ids.offsets is None
        for field in ("ids", "type_ids", "special_tokens_mask", "sequence_ids"):
            assert getattr(of_ids, field) == getattr(of_text, field)
        assert tokenizer.encoding(first, "the fox").ids == of_text.ids
        whole = tokenizer.encoding(first)  # nothing is put around a whole input
        assert (whole.ids, whole.sequence_ids) == (first, [0] * len(first))
        assert tokenizer.encoding(first, add_special_tokens=True) == tokenizer.encoding(
            first, truncation=Truncation(99), add_special_tokens=True
        )
        assert tokenizer.encoding("hello world").ids == tokenizer.encode("hello world")
        assert tokenizer.encoding("hello world", add_special_tokens=False).ids == first


def test_sentencepiece_pairs(sp_chat: Path) -> None:
    """As transformers' Llama."""
    ours, theirs = load_tokenizer(sp_chat), transformers.AutoTokenizer.from_pretrained(sp_chat)
    for pair in (("hello", None), ("hello", "world x")):
        encoding, other = ours.encoding(*pair), theirs(*pair, return_token_type_ids=True).encodings[0]
        assert (encoding.ids, encoding.special_tokens_mask) == (other.ids, other.special_tokens_mask)
        assert (encoding.type_ids, encoding.offsets) == (other.type_ids, None)


def test_all_files_are_fetched_and_kept(folder_of: Callable[[str], Path]) -> None:
    for kind in KINDS:
        folder = folder_of(kind)
        assert set(os.listdir(folder)) == set(files_of(folder))
        assert set(os.listdir(folder)) - {"config.json"} == set(beside(folder))
    assert VOCABULARIES


def test_gpt2_generates_without_tokenizer_json(tmp_path: Path, checkpoints: Any) -> None:
    """Its vocabulary in the files of 2019, beside the same in tokenizer.json."""
    prompts = ["hello world", "  é 日本\n"]
    params = SamplingParams(temperature=0.0, max_tokens=12)
    outputs = []
    for old in (False, True):
        folder = shutil.copytree(checkpoints("gpt2").folder, tmp_path / str(old))
        if old:
            model = json.loads((folder / "tokenizer.json").read_text())["model"]
            for file in folder.glob("tokenizer*"):
                file.unlink()
            write(folder, vocab_json=model["vocab"] | {"<|endoftext|>": len(model["vocab"])})
            (folder / "merges.txt").write_text("#version: 0.2\n")
        with LLM(folder, max_num_seqs=2, max_num_batched_tokens=32) as llm:
            outputs.append(llm.generate(prompts, params, use_tqdm=False))
            streamed = "".join(llm.stream(prompts[0], params))
            assert streamed == outputs[-1][0].outputs[0].text
    for one, other in zip(*outputs, strict=True):
        assert one.prompt_token_ids == other.prompt_token_ids
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        assert one.outputs[0].text == other.outputs[0].text
