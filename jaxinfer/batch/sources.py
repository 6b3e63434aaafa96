"""Which files a job reads: paths, globs, folders, stdin; local or wherever fsspec reaches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """One input file. name: as shown; url: for fsspec, "-" is stdin; size: bytes as stored, 0 of stdin."""

    name: str
    url: str
    size: int

    def fingerprint(self) -> str:
        """A digest of the content; for files in a store that keeps a checksum of them, that. "" for stdin."""
        raise NotImplementedError


def find_sources(inputs: Sequence[str]) -> list[Source]:
    """The files that INPUT... mean, in order. Raises ValueError, FileNotFoundError and other OSErrors."""
    raise NotImplementedError
