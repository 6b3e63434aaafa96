"""Tokenizers in the files that came before tokenizer.json, through transformers' classes for them.

What tokenizer_config.json says is somebody else's: its `tokenizer_class` is looked up in a closed list, and the class
is shown only those files and options that are known here, in a folder made for it. No code of a repository is ever run.
"""

from __future__ import annotations

import importlib
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxinfer.errors import CheckpointError
from jaxinfer.models.wrapped import with_text
from jaxinfer.text.base import Tokenizer
from jaxinfer.text.files import TokenFiles, one_line, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["VOCABULARIES", "class_name", "load_legacy_tokenizer"]


class Kind(NamedTuple):
    """A tokenizer class that may be named.

    module: of which folder of `transformers.models` it is.
    files: those that it needs.
    models: the model types that mean it where no class is named.
    name: what it is called there, if otherwise.
    """

    module: str
    files: tuple[str, ...]
    models: tuple[str, ...] = ()
    name: str | None = None


_WORDPIECE = ("vocab.txt",)
_BYTE_BPE = ("vocab.json", "merges.txt")
_FAIRSEQ = ("sentencepiece.bpe.model",)
_SPIECE = ("spiece.model",)
_QWEN2 = ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe")

_KINDS = {
    "AlbertTokenizer": Kind("albert", _SPIECE, ("albert",)),
    "BartTokenizer": Kind("roberta", _BYTE_BPE, ("bart",), "RobertaTokenizer"),
    "BertTokenizer": Kind("bert", _WORDPIECE, ("bert", "nomic_bert")),
    "BigBirdTokenizer": Kind("big_bird", _SPIECE, ("big_bird",)),
    "ByT5Tokenizer": Kind("byt5", ()),
    "CamembertTokenizer": Kind("camembert", _FAIRSEQ, ("camembert",)),
    "DebertaV2Tokenizer": Kind("deberta_v2", ("spm.model",), ("deberta-v2",)),
    "DistilBertTokenizer": Kind("bert", _WORDPIECE, ("distilbert",), "BertTokenizer"),
    "ElectraTokenizer": Kind("bert", _WORDPIECE, ("electra",), "BertTokenizer"),
    "GPT2Tokenizer": Kind("gpt2", _BYTE_BPE, ("gpt2", "gpt_neo", "gptj", "opt", "phi", "starcoder2")),
    "LEDTokenizer": Kind("roberta", _BYTE_BPE, (), "RobertaTokenizer"),
    "LongformerTokenizer": Kind("roberta", _BYTE_BPE, ("longformer",), "RobertaTokenizer"),
    "MBart50Tokenizer": Kind("mbart50", _FAIRSEQ),
    "MBartTokenizer": Kind("mbart", _FAIRSEQ, ("mbart",)),
    "MPNetTokenizer": Kind("mpnet", _WORDPIECE, ("mpnet",)),
    "MarianTokenizer": Kind("marian", ("source.spm", "target.spm", "vocab.json"), ("marian",)),
    "MobileBertTokenizer": Kind("bert", _WORDPIECE, ("mobilebert",), "BertTokenizer"),
    "NllbTokenizer": Kind("nllb", _FAIRSEQ),
    "PegasusTokenizer": Kind("pegasus", _SPIECE, ("pegasus",)),
    "Qwen2Tokenizer": Kind("qwen2", _BYTE_BPE, _QWEN2),
    "RobertaTokenizer": Kind("roberta", _BYTE_BPE, ("roberta", "roberta-prelayernorm")),
    "T5Tokenizer": Kind("t5", _SPIECE, ("t5", "mt5", "switch_transformers")),
    "WhisperTokenizer": Kind("whisper", _BYTE_BPE, ("whisper",)),
    "XLMRobertaTokenizer": Kind("xlm_roberta", _FAIRSEQ, ("xlm-roberta",)),
}
VOCABULARIES = sorted({name for kind in _KINDS.values() for name in kind.files})
_OF_MODEL = {model: name for name, kind in _KINDS.items() for model in kind.models}

# Options that a class may see, besides special tokens.
_OPTIONS = {
    "add_bos_token": bool,
    "add_eos_token": bool,
    "add_prefix_space": bool,
    "do_lower_case": bool,
    "extra_ids": int,
    "keep_accents": bool,
    "language": str,
    "legacy_behaviour": bool,
    "mask_token_sent": str,
    "offset": int,
    "predict_timestamps": bool,
    "separate_vocabs": bool,
    "source_lang": str,
    "split_by_punct": bool,
    "src_lang": str,
    "strip_accents": bool,
    "target_lang": str,
    "task": str,
    "tgt_lang": str,
    "tokenize_chinese_chars": bool,
    "trim_offsets": bool,
}
# Options that would change tokens, and are refused with another value. All others change none.
_FIXED: dict[str, Any] = {
    "do_basic_tokenize": True,
    "never_split": [],
    "sp_model_kwargs": {},
    "split_special_tokens": False,
}
_MOST_IDS = 2**10  # of `extra_ids` and `offset`: so many tokens are made, in a time that goes with their square


def class_name(folder: Path) -> str | None:
    """The class that a folder names: in tokenizer_config.json or config.json, else by its model type."""
    config = read_json(folder / "config.json")
    for value in (read_json(folder / "tokenizer_config.json"), config):
        name = value.get("tokenizer_class")
        if isinstance(name, str) and name not in ("PreTrainedTokenizerFast", "TokenizersBackend"):
            return name.removesuffix("Fast")
    model_type = with_text(config).get("model_type")
    return _OF_MODEL.get(model_type) if isinstance(model_type, str) else None


def load_legacy_tokenizer(files: TokenFiles) -> Tokenizer:
    """The tokenizer in a folder without tokenizer.json. Raises ValueError."""
    from jaxinfer.text.hf import HFTokenizer, naming_panics
    from jaxinfer.text.python import PythonTokenizer

    name, kind = _kind(files)
    _check_files(kind, files.folder)
    try:
        with naming_panics(f"{files.folder}: {', '.join(kind.files)}"), _quietly():
            theirs = _theirs(name, kind, files)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{files.folder}: no {name} can be made of its files ({one_line(error)}); download them again: "
            f"{', '.join((*kind.files, 'tokenizer_config.json'))}"
        ) from None
    _check(name, kind, files, theirs)
    files.named = {key: str(value) for key, value in theirs.special_tokens_map.items()}
    if not theirs.is_fast:
        return PythonTokenizer(files, theirs)
    tokenizer = theirs.backend_tokenizer
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    return HFTokenizer(files, tokenizer, special)


def _kind(files: TokenFiles) -> tuple[str, Kind]:
    """The class, whose files are there. Raises CheckpointError."""
    folder = files.folder
    name = class_name(folder)
    remedy = (
        "add the checkpoint's tokenizer.json (transformers' save_pretrained writes it), or load with tokenizer=PATH"
    )
    if name is None:
        there = [file for file in VOCABULARIES if (folder / file).is_file()]
        raise CheckpointError(
            f"{folder}: nothing says whose tokenizer {_listed(there)} is: there is no tokenizer_class in "
            f"tokenizer_config.json, and no model_type in config.json that has one here; {remedy}"
        )
    if name not in _KINDS:
        why = "is none that is known here without a tokenizer.json"
        if "auto_map" in files.config:
            why = "is code that comes with the checkpoint (auto_map), which is never run"
        raise CheckpointError(f"{folder / 'tokenizer_config.json'}: tokenizer_class {name!r:.80} {why}; {remedy}")
    kind = _KINDS[name]
    missing = [file for file in kind.files if not (folder / file).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder}: {name} reads {_listed(kind.files)}, and {_listed(missing)} is not there; "
            "copy it from the checkpoint, or add its tokenizer.json"
        )
    return name, kind


def _check_files(kind: Kind, folder: Path) -> None:
    """That each is what its name says, which transformers doesn't look at. Raises ValueError."""
    for path in (folder / file for file in kind.files):
        if path.suffix == ".json":
            read_json(path)
        elif path.suffix == ".txt":
            try:
                path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise CheckpointError(f"{path}: not UTF-8 ({one_line(error)}); download the file again") from None
        else:
            from jaxinfer.text.spm import read_model

            read_model(path)


def _theirs(name: str, kind: Kind, files: TokenFiles) -> PreTrainedTokenizerBase:
    from tempfile import TemporaryDirectory  # which other folders need not wait for

    module = importlib.import_module(f"transformers.models.{kind.module}.tokenization_{kind.module}")
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for file in (*kind.files, "added_tokens.json", "target_vocab.json"):
            if (files.folder / file).is_file():
                (folder / file).symlink_to((files.folder / file).resolve())
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            if (files.folder / file).is_file():
                (folder / file).write_text(json.dumps(_known(files.folder / file)))
        theirs = getattr(module, kind.name or name).from_pretrained(folder, local_files_only=True)
        if theirs.is_fast and len(kind.files) == 1 and kind.files != _WORDPIECE:
            _normalize(theirs.backend_tokenizer, folder / kind.files[0])
    return theirs


def _known(path: Path) -> dict[str, Any]:
    """What a class may see of a file of options. Raises CheckpointError for what it can't do."""
    known: dict[str, Any] = {}
    for key, value in read_json(path).items():
        if value is None and not key.endswith("_token"):  # as if it were not there; no token is told from the usual one
            continue
        if key in _FIXED and value != _FIXED[key]:
            raise CheckpointError(f"{path}: {key} is {value!r:.80}; only {_FIXED[key]!r} is supported")
        if key in _OPTIONS:
            wrong = type(value) is not _OPTIONS[key] or (isinstance(value, int) and not 0 <= value <= _MOST_IDS)
            if wrong:
                wanted = {bool: "true or false", int: f"0 to {_MOST_IDS}", str: "a text"}[_OPTIONS[key]]
                raise CheckpointError(f"{path}: {key} is {value!r:.80}; it must be {wanted}")
            known[key] = value
        elif key.endswith(("_token", "_special_tokens")) or key == "added_tokens_decoder":
            known[key] = value
    return known


def _normalize(tokenizer: Any, model: Path) -> None:
    """Gives the model's own normalization of characters to a tokenizer whose class leaves it out: those of mBART,
    DeBERTa and BigBird do in transformers 5. (In 4 none did, nor where models are trained.)"""
    from tokenizers import normalizers
    from transformers.convert_slow_tokenizer import SentencePieceExtractor

    characters = SentencePieceExtractor(str(model)).proto.normalizer_spec.precompiled_charsmap
    own = tokenizer.normalizer
    if characters and (own is None or b"Precompiled" not in own.__getstate__()):
        first = normalizers.Precompiled(characters)
        tokenizer.normalizer = first if own is None else normalizers.Sequence([first, own])


def _check(name: str, kind: Kind, files: TokenFiles, theirs: PreTrainedTokenizerBase) -> None:
    """That tokens have the ids of the checkpoint: where files don't say them, transformers makes some up."""
    unknown = theirs.unk_token_id
    if kind.files == _WORDPIECE and (unknown is None or unknown >= theirs.vocab_size):
        problem = f"{files.folder / 'vocab.txt'}: {theirs.unk_token!r} is missing, so it is not a vocabulary of {name}"
        raise CheckpointError(f"{problem}; download it again")
    for token_id, token in files.added.items():
        actual = theirs.convert_tokens_to_ids(token.content)
        if actual != token_id:
            raise CheckpointError(
                f"{files.folder / 'tokenizer_config.json'}: token {token.content!r} has id {token_id} there but "
                f"{actual} in the vocabulary; take all tokenizer files from the same checkpoint"
            )
    if name == "NllbTokenizer" and not files.added:  # the mask would come before the languages
        raise CheckpointError(
            f"{files.folder}: nothing says which ids the languages of {name} have; add the checkpoint's "
            "tokenizer_config.json with its added_tokens_decoder, or its tokenizer.json"
        )
    if unknown in theirs.encode("") and unknown not in (None, theirs.bos_token_id, theirs.eos_token_id):
        raise CheckpointError(
            f"{files.folder / 'tokenizer_config.json'}: {name} puts around texts what is not in the vocabulary "
            f"(src_lang is {files.config.get('src_lang')!r:.80}); take all tokenizer files from the same checkpoint"
        )


def _listed(names: Sequence[str]) -> str:
    return " and ".join(names) or "this"


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what transformers logs and warns of: that there is no torch, and what it tries before it fails."""
    logger = logging.getLogger("transformers")
    disabled, logger.disabled = logger.disabled, True
    try:
        from transformers import logging as theirs
    finally:
        logger.disabled = disabled
    level = theirs.get_verbosity()
    theirs.set_verbosity_error()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        theirs.set_verbosity(level)
