"""Where a job writes: a folder of parts, each of them there as a whole or not at all, or one file made of them.

A part has a fixed number of the input's rows, so its content does not depend on where a job was stopped.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator, Sequence
from typing import IO, get_args

from fsspec.implementations.local import LocalFileSystem

from jaxinfer.batch.formats import FILES, Format, file_format
from jaxinfer.places import check_new, locate


class Output:
    """A folder, or a file (a name that ends in a format) with a folder `NAME.parts` beside it meanwhile.

    output: a path, or a URL that fsspec knows.
    format: of a folder's parts; a file's is its suffix.

    Raises ValueError for a format that is unknown or is not the file's.
    """

    def __init__(self, output: str, format: Format | None = None):
        self.name = output.rstrip("/") or output
        self.fs, path = locate(self.name, "output")
        self.local = isinstance(self.fs, LocalFileSystem)
        folder = output.endswith("/") or (self.local and os.path.isdir(path))
        named = file_format(path, folder)
        self.file: str | None = path if named and not folder else None
        if self.file and format not in (None, named):
            raise ValueError(f"output {output}: format is {format}, and the name says {named}; leave one of them out")
        self.format: Format = format or named or "jsonl"
        if self.format not in get_args(Format):
            raise ValueError(f"format is {format!r}: it must be one of {', '.join(get_args(Format))}")
        self.folder = f"{path}.parts" if self.file else path

    def path(self, name: str) -> str:
        return f"{self.folder}/{name}"

    def part(self, number: int) -> str:
        """The path of a part. Names are the same whoever writes them, so shards may share a folder."""
        return self.path(f"part-{number:05d}.{self.format}")

    def names(self) -> list[str]:
        """The names in the folder; none if it is not there."""
        self.fs.invalidate_cache()
        if not self.fs.exists(self.folder):
            return []
        if not self.fs.isdir(self.folder):
            raise NotADirectoryError(f"{self.folder}: not a folder; the output is a folder, or a file {FILES}")
        return sorted(os.path.basename(path.rstrip("/")) for path in self.fs.ls(self.folder, detail=False))

    def numbers(self) -> set[int]:
        """The parts that are there."""
        matches = (re.fullmatch(rf"part-(\d{{5,}})\.{re.escape(self.format)}", name) for name in self.names())
        return {int(match[1]) for match in matches if match}

    def check(self) -> None:
        """Raises ValueError if it is not there and can't be made, which is tried."""
        if self.local and not os.path.exists(self.folder):
            check_new(self.folder, f"output {self.name}")
            if self.file and not os.path.exists(self.file):
                check_new(self.file, f"output {self.name}")
                # The longest name of all is written at the end.
                check_new(temporary_name(f"{self.file}.manifest.json"), f"output {self.name}")

    def make(self) -> None:
        with writing(self.folder):
            self.fs.makedirs(self.folder, exist_ok=True)

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Keeps a second process from the same work, where the folder is local, which is made. Raises ValueError if
        there is one."""
        self.make()
        if not self.local:
            yield
            return
        path = self.path(f".{name}.lock")
        with writing(path):
            file = self._locked(path)
        with file:
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    os.unlink(path)

    def _locked(self, path: str) -> IO[bytes]:
        while True:
            try:
                file = open(path, "wb")  # noqa: SIM115
            except FileNotFoundError:  # who had it before has just made one file of the parts
                self.make()
                continue
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise ValueError(f"{self.name}: another process is writing it; wait for it, or end it") from None
            except OSError:  # a file system without locks
                return file
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    return file
            file.close()  # it was removed by who had it before

    @contextlib.contextmanager
    def whole(self, path: str) -> Iterator[IO[bytes]]:
        """A file to write that is there when the block ends well, all of it and on the disk, and otherwise is not.

        Raises OSError, one line, if that can't be done.
        """
        if not self.local:
            with writing(path):
                file = self.fs.open(path, "wb", autocommit=False)
                try:
                    yield file
                    file.close()
                    file.commit()
                except BaseException:
                    with contextlib.suppress(Exception):
                        file.discard()
                    raise
            return
        temporary = temporary_name(path)
        with writing(path):
            try:
                with open(temporary, "wb") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise
            folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
            try:
                os.fsync(folder)  # or a power failure could undo the renaming
            finally:
                os.close(folder)

    def write(self, path: str, content: bytes) -> None:
        if self.local:
            with self.whole(path) as file:
                file.write(content)
        else:  # at once: a store of objects never has half of one
            with writing(path):
                self.fs.pipe_file(path, content)

    def remove(self, names: Sequence[str]) -> None:
        """Removes files of the folder; those that are gone already don't matter."""
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm_file(self.path(name))


@contextlib.contextmanager
def writing(path: str) -> Iterator[None]:
    """Says what can't be written and what to do about it."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # it has been said
            raise
        why = error.strerror or type(error).__name__
        raise OSError(f"{path}: can't be written ({why}); what is finished stays: put that right, and go on") from None


def temporary_name(path: str) -> str:
    """Hidden, so that nobody who reads the folder takes it for a part."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}.tmp")
