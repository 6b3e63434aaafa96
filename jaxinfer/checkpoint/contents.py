"""Which files of a folder, a repository or an object store are a checkpoint's."""

from __future__ import annotations

import os
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from jaxinfer.places import inside

# SentencePiece models, as tokenizers' classes call them.
PIECES = ("tokenizer.model", "sentencepiece.bpe.model", "spiece.model", "spm.model", "*.spm")
# Mistral's second copy of the weights is never downloaded.
SMALL = ("*.json", "*.jinja", *PIECES, "merges.txt", "vocab.txt")
ALLOW = (*SMALL, "*.safetensors")
# Where a repository has no safetensors: what transformers would take.
PICKLED = ("pytorch_model.bin", "pytorch_model-*.bin", "adapter_model.bin")
PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
PICKLED_OTHER = ("training_args.bin", "optimizer*", "scheduler*", "rng_state*", "scaler*")
IGNORE = ("consolidated*.safetensors",)
# transformers' folders of named chat templates; other folders have other exports.
TEMPLATES = ("chat_templates/*.jinja", "additional_chat_templates/*.jinja")
# What goes along with weights: the tokenizer, how to generate, and what must not be separated from them.
BESIDE = (*SMALL, "LICENSE*", "NOTICE*")
NOT_BESIDE = (
    "config.json",
    "adapter_config.json",
    "*.index.json",
    "quantize_config.json",
    "quant_config.json",
    "jaxinfer.json",
)


def belonging(names: Iterable[str], allow: Iterable[str] = ALLOW, ignore: Iterable[str] = IGNORE) -> list[str]:
    """Of relative names those that are a checkpoint's, sorted."""
    return sorted(
        name
        for name in names
        if (any(_fits(name, pattern) for pattern in (*allow, *TEMPLATES)) and not any(_fits(name, p) for p in ignore))
    )


def weights_of(names: Iterable[str]) -> tuple[str, ...]:
    """Patterns of the files of a repository with these `names`: pickled weights where there are no others."""
    others = (*IGNORE, "adapter_model.safetensors")
    safe = any(_fits(name, "*.safetensors") and not any(_fits(name, other) for other in others) for name in names)
    return ALLOW if safe else (*ALLOW, *PICKLED)


def files_of(folder: Path, allow: Iterable[str] = ALLOW) -> list[str]:
    """The relative names of a local checkpoint's files, sorted, with other copies of the weights."""
    return belonging(_names(folder), allow, ignore=())


def beside(folder: Path) -> list[str]:
    """Those that are neither weights nor config.json, and what else goes along with them. Raises ValueError for a link
    that leads out of the folder."""
    names = belonging(_names(folder), BESIDE, NOT_BESIDE)
    for name in names:
        inside(folder, name, f"{folder}: file")
    return names


def _names(folder: Path) -> list[str]:
    directories = [folder, *(folder / pattern.split("/")[0] for pattern in TEMPLATES)]
    return [
        os.path.relpath(file, folder)
        for directory in directories
        if directory.is_dir()
        for file in directory.iterdir()
        if file.is_file()
    ]


def _fits(name: str, pattern: str) -> bool:
    """As in a shell: `*` is no slash."""
    parts, wanted = PurePosixPath(name).parts, pattern.split("/")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))
