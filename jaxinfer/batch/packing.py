"""How files are packed: gzip and zstd."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from typing import Any

from jaxinfer.batch.sources import need

PACKED_PIECE = 2**8  # small, as 4 bytes of zstd can be 2**17 when they are unpacked


def packed(content: bytes, packing: str) -> bytes:
    """One gzip member or zstd frame, the same for the same content; as it is where packing is "". Files of several are
    files too."""
    if packing == ".gz":
        return gzip.compress(content, 6, mtime=0)
    if packing == ".zst":
        return bytes(need("zstandard", "an output *.zst").ZstdCompressor().compress(content))
    return content


def unpacked(pieces: Iterator[bytes], packing: str, name: str) -> Iterator[bytes]:
    """The content of gzip members or zstd frames, of which a file may have several; as it is where packing is "".
    Unlike the packages' own readers of files, this raises EOFError where the last one is cut off."""
    if not packing:
        yield from pieces
        return
    zstd = need("zstandard", name).ZstdDecompressor() if packing == ".zst" else None
    unit: Any = None
    for piece in (big[i : i + PACKED_PIECE] for big in pieces for i in range(0, len(big), PACKED_PIECE)):
        while piece := piece if unit else piece.lstrip(b"\0"):  # zeros in between are padding
            if unit is None:
                unit = zstd.decompressobj() if zstd else zlib.decompressobj(wbits=31)
            yield unit.decompress(piece)
            piece, unit = (unit.unused_data, None) if unit.eof else (b"", unit)
    if unit:
        raise EOFError("it ends in the middle of its packed data")
