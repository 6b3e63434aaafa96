"""By what a model is known again, without reading all of it."""

from __future__ import annotations

import fnmatch
import hashlib
from pathlib import Path

from jaxinfer.checkpoint.hub import ALLOW, SMALL

HEAD = 2**20
BLOCK, BLOCKS = 2**16, 64


def model_fingerprint(folder: Path, weights: bool = True) -> str:
    """A digest of a checkpoint: its configuration and tokenizer, and with `weights` of each weight file the size, the
    first MiB (the header, or most of it) and 64 blocks of 64 KiB spread over the rest.

    Reading 140 GB at each start would take minutes, so weights that differ in a few places only may go unnoticed.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.iterdir()):
        patterns = ALLOW if weights else SMALL
        if not any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns) or not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with open(path, "rb") as file:
            if path.suffix != ".safetensors":
                digest.update(file.read())
                continue
            digest.update(file.read(HEAD))
            for i in range(BLOCKS):
                file.seek(HEAD + (size - HEAD) * i // BLOCKS if size > HEAD else size)
                digest.update(file.read(BLOCK))
    return digest.hexdigest()
