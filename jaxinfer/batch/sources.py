"""Which files a job reads: paths, globs, folders, stdin; local or wherever fsspec reaches."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import re
import stat
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from jaxinfer.batch.values import printable
from jaxinfer.text.files import one_line

STDIN = "-"
KINDS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".txt": "text", ".parquet": "parquet"}
PACKED = (".gz", ".zst")  # all but Parquet, which packs by itself
KNOWN = "*.jsonl, *.ndjson, *.json (JSON Lines, or an array), *.csv, *.txt, each also as .gz or .zst, and *.parquet"
CHECKSUMS = ("md5Hash", "content_md5", "crc32c", "ETag", "etag")  # what stores call theirs, in fsspec's info
DRIVERS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}  # the extras of this package
PIECE = 2**20


@dataclass(frozen=True)
class Source:
    """One input file.

    name: as shown.
    url: for fsspec, "-" is stdin.
    size: bytes as stored, 0 of stdin.
    """

    name: str
    url: str
    size: int

    @property
    def format(self) -> tuple[str, str]:
        """What is in it, json, csv, text or parquet, and how it is packed, "", .gz or .zst. Stdin is JSON Lines.

        Raises ValueError for a suffix that says something else."""
        file_format = ("json", "") if self.url == STDIN else _format(self.name)
        if file_format is None:
            raise ValueError(f"input {self.name}: its suffix says nothing that is known; known are {KNOWN}")
        return file_format

    def open(self) -> IO[bytes]:
        """The file, to read. Raises OSError."""
        if self.url == STDIN:  # unbuffered: what is there, without waiting for more of it
            return getattr(sys.stdin.buffer, "raw", sys.stdin.buffer)
        with reading(self.name):
            fs, path = fsspec.core.url_to_fs(self.url)
            return fs.open(path, "rb")

    def fingerprint(self) -> str:
        """A digest of the content; for files in a store that keeps a checksum of them, that. "" for stdin, which can't
        be read twice. Reads a local file to its end. Raises OSError."""
        if self.url == STDIN:
            return ""
        with reading(self.name):
            fs, path = fsspec.core.url_to_fs(self.url)
            if not isinstance(fs, LocalFileSystem):
                info = fs.info(path)
                for name in CHECKSUMS:
                    if info.get(name):
                        return f"{name.lower()}:{info[name]}"
            digest = hashlib.blake2b(digest_size=16)
            with fs.open(path, "rb") as file:
                while piece := file.read(PIECE):
                    digest.update(piece)
        return f"blake2b:{digest.hexdigest()}"


def find_sources(inputs: Sequence[str]) -> list[Source]:
    """The files that INPUT... mean: each a path, a glob, a folder, one of these as a URL, or "-".

    Order is as given; within a glob or a folder by name. A folder means the files directly in it that have a known
    suffix, but not *.json, which are settings more often than rows. Neither finds names that begin with a dot.
    Raises ValueError, or FileNotFoundError and other OSErrors, before anything is read.
    """
    if not inputs:
        raise ValueError("input: there is none; give a file, a glob, a folder, or - for stdin")
    sources = [source for spec in inputs for source in _find(spec)]
    seen = set()
    for source in sources:
        kind, packing = source.format
        if kind == "parquet" or packing == ".zst":
            need("pyarrow" if kind == "parquet" else "zstandard", f"input {source.name}")
        if source.url in seen:
            raise ValueError(f"input {source.name}: is there twice, and its rows would be too; name it once")
        seen.add(source.url)
    return sources


def need(package: str, where: str) -> Any:
    """A package of the extra `batch`, imported. Raises ValueError if it is not there."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ValueError(f"{where}: needs the package {package}: pip install '.[batch]'") from None


@contextlib.contextmanager
def reading(where: str) -> Iterator[None]:
    """Turns what stores raise, which can be anything, into an OSError of one line that begins with `where`."""
    try:
        yield
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise type(error)(f"{where}: {error.strerror or 'no such file'}; check the name and who may read it") from None
    except Exception as error:
        raise OSError(f"{where}: can't be read ({type(error).__name__}: {one_line(error)})") from None


def _find(spec: str) -> list[Source]:
    if spec == STDIN:
        return [Source("stdin", STDIN, 0)]
    where = f"input {spec}"
    if "::" in spec:
        raise ValueError(f"{where}: a URL within another; copy the file to where it can be named by one")
    try:
        fs, path = fsspec.core.url_to_fs(spec)
    except ImportError as error:
        extra = DRIVERS.get(spec.split(":")[0])
        remedy = f"pip install '.[{extra}]'" if extra else one_line(error)
        raise ValueError(f"{where}: the package for such URLs is missing: {remedy}") from None
    except ValueError as error:
        raise ValueError(f"{where}: {one_line(error)}; known are paths, gs://, s3:// and what fsspec knows") from None

    with reading(where):
        if fs.isdir(path):
            infos = [info for info in fs.ls(path, detail=True) if _is_rows(info)]
            nothing = f"no file of rows is in this folder; known are {KNOWN}"
        elif fs.exists(path) or not any(c in path for c in "*?["):  # a name may have brackets of its own
            infos, nothing = [fs.info(path)], ""
        else:
            matches = fs.glob(path, detail=True).values()
            infos = [info for info in matches if info["type"] != "directory" and not _is_hidden(info)]
            nothing = "no file matches"
    if not infos:
        raise FileNotFoundError(f"{where}: {nothing}")
    return [_source(fs, info, spec) for info in sorted(infos, key=lambda info: info["name"])]


def _format(name: str) -> tuple[str, str] | None:
    stem, packing = os.path.splitext(os.path.basename(name).lower())
    if packing in PACKED:
        stem, suffix = os.path.splitext(stem)
    else:
        suffix, packing = packing, ""
    kind = KINDS.get(suffix)
    return None if kind is None or (kind == "parquet" and packing) else (kind, packing)


def _is_rows(info: dict[str, Any]) -> bool:
    name = info["name"].lower()
    settings = re.search(r"\.json(\.|$)", name)
    return info["type"] != "directory" and not _is_hidden(info) and not settings and _format(name) is not None


def _is_hidden(info: dict[str, Any]) -> bool:
    return os.path.basename(info["name"]).startswith(".")


def _source(fs: Any, info: dict[str, Any], spec: str) -> Source:
    """A local file is shown as it was named: relative if `given` was."""
    path = info["name"]
    if not isinstance(fs, LocalFileSystem):
        url = fs.unstrip_protocol(path)
        return Source(url, url, info["size"] or 0)
    relative = not (os.path.isabs(spec) or spec.startswith(("file:", "local:", "~")))
    name = printable(os.path.relpath(path) if relative else path)
    with reading(f"input {name}"):
        status = os.stat(path)  # of what a link leads to, unlike fsspec's
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"input {name}: not a regular file; for a pipe, give - and pipe it into stdin")
    return Source(name, path, status.st_size)
