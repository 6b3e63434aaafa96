"""Which tokenizer a folder has, and its loading."""

from __future__ import annotations

from pathlib import Path

from jaxinfer.text.files import TokenFiles
from jaxinfer.text.tokenizer import Tokenizer

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
