"""Loading the tokenizer of a checkpoint, whatever files it comes in."""

from __future__ import annotations

from pathlib import Path

from jaxinfer.text.base import Tokenizer
from jaxinfer.text.files import TokenFiles

LOOKED_FOR = "tokenizer.json, tokenizer.model, and vocab.json with merges.txt"


def has_tokenizer(folder: Path) -> bool:
    """Whether there are files that `load_tokenizer` takes."""
    whole = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    return whole or ((folder / "vocab.json").is_file() and (folder / "merges.txt").is_file())


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a checkpoint folder.

    `tokenizer.json` wins over `tokenizer.model`, and that over `vocab.json` with `merges.txt`. Raises
    FileNotFoundError when none is there, ValueError when what is there can't be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give the folder that holds the tokenizer's files")
    if not has_tokenizer(folder):
        raise FileNotFoundError(
            f"{folder}: no tokenizer; looked for {LOOKED_FOR}; copy the checkpoint's tokenizer files there"
        )
    if not (folder / "tokenizer.json").is_file() and (folder / "tokenizer.model").is_file():
        from jaxinfer.text.spm import SentencePieceTokenizer  # each brings a library of its own

        return SentencePieceTokenizer(TokenFiles(folder))
    from jaxinfer.text.hf import HFTokenizer

    return HFTokenizer(TokenFiles(folder))


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises ValueError when the tokenizer has ids that a model with `vocab_size` rows of embedding lacks."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"{tokenizer.folder}: the tokenizer has ids up to {tokenizer.vocab_size - 1} but config.json says "
            f"vocab_size {vocab_size}; take the tokenizer and the weights from the same checkpoint"
        )
