"""By what a model is known again, without reading all of it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from jaxinfer.checkpoint.contents import PICKLED_SUFFIXES, SMALL, files_of

HEAD = 2**20
BLOCK, BLOCKS = 2**16, 64


def model_fingerprint(folder: Path, weights: bool = True) -> str:
    """A digest of a checkpoint: its configuration and tokenizer, and with `weights` of each weight file the size, the
    first MiB (the header, or most of it) and 64 blocks of 64 KiB spread over the rest; and of its modules the same.

    Reading 140 GB at each start would take minutes, so weights that differ in a few places only may go unnoticed.
    """
    digest = hashlib.blake2b(digest_size=16)
    large = (".safetensors", *PICKLED_SUFFIXES)
    wanted = (*SMALL, *(f"*{suffix}" for suffix in large)) if weights else SMALL
    files = {name: folder / name for name in files_of(folder, wanted)}
    if "modules.json" in files:
        from jaxinfer.checkpoint.sentence import module_folders  # JAX comes with it

        for i, module in enumerate(module_folders(folder)):
            if module.is_dir() and module != folder:
                files |= {f"{i}/{name}": module / name for name in files_of(module, wanted)}
    for name, path in files.items():
        size = path.stat().st_size
        digest.update(f"{name}\0{size}\0".encode())
        with open(path, "rb") as file:
            if path.suffix not in large:
                digest.update(file.read())
                continue
            digest.update(file.read(HEAD))
            for i in range(BLOCKS):
                file.seek(HEAD + (size - HEAD) * i // BLOCKS if size > HEAD else size)
                digest.update(file.read(BLOCK))
    return digest.hexdigest()
