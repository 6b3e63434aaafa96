"""Loading the tokenizer of a checkpoint, whatever files it comes in."""

from __future__ import annotations

from pathlib import Path

from jaxinfer.text.base import Tokenizer
from jaxinfer.text.files import TokenFiles
from jaxinfer.text.legacy import VOCABULARIES, class_name, load_legacy_tokenizer

LOOKED_FOR = f"tokenizer.json, tokenizer.model, {', '.join(VOCABULARIES)}"


def has_tokenizer(folder: Path) -> bool:
    """Whether there are files that `load_tokenizer` takes, or should, if one of several is missing."""
    there = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", *VOCABULARIES))
    return there or class_name(folder) == "ByT5Tokenizer"  # which has no vocabulary


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a checkpoint folder.

    `tokenizer.json` wins over `tokenizer.model`, and that over older files. Raises FileNotFoundError when none is
    there, ValueError when what is there can't be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give the folder that holds the tokenizer's files")
    if not has_tokenizer(folder):
        raise FileNotFoundError(
            f"{folder}: no tokenizer; looked for {LOOKED_FOR}; copy the checkpoint's tokenizer files there"
        )
    # Each brings a library of its own.
    if (folder / "tokenizer.json").is_file():
        from jaxinfer.text.hf import read_tokenizer_json

        return read_tokenizer_json(TokenFiles(folder))
    if (folder / "tokenizer.model").is_file():
        from jaxinfer.text.spm import SentencePieceTokenizer

        return SentencePieceTokenizer(TokenFiles(folder))
    return load_legacy_tokenizer(TokenFiles(folder))


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises ValueError when the tokenizer has ids that a model with `vocab_size` rows of embedding lacks."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"{tokenizer.folder}: the tokenizer has ids up to {tokenizer.vocab_size - 1} but config.json says "
            f"vocab_size {vocab_size}; take the tokenizer and the weights from the same checkpoint"
        )
