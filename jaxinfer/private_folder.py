"""Files that a start leaves for the next one, where nobody else can write: each is written whole, and read if it is."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
from pathlib import Path

import psutil

DIGEST = 32  # bytes of SHA-256, before each file's content
SHARED = ("nfs", "cifs", "smb", "fuse", "9p", "lustre", "gpfs", "ceph", "afs", "beegfs", "virtiofs")  # file systems


class PrivateFolder:
    """A folder of this user's alone, on a disk of this machine's alone.

    path: it, made if need be. Raises OSError that says why it is not to be used.
    """

    def __init__(self, path: Path):
        self.path = path
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if problem := _problem(path):
            raise OSError(0, problem)

    def read(self, name: str) -> bytes:
        """A file's content. Links are not followed. Raises OSError, or ValueError if it is damaged."""
        descriptor = os.open(self.path / name, os.O_RDONLY | os.O_NOFOLLOW)
        with open(descriptor, "rb") as file:
            content = file.read()
        if hashlib.sha256(content[DIGEST:]).digest() != content[:DIGEST]:
            raise ValueError("it is damaged")
        return content[DIGEST:]

    def write(self, name: str, content: bytes) -> None:
        """Of two that write the same file one stays, whole. Raises OSError."""
        path = self.path / name
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
            try:
                file.write(hashlib.sha256(content).digest() + content)
                file.close()
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise

    def remove(self, name: str) -> None:
        with contextlib.suppress(OSError):
            (self.path / name).unlink()

    def use(self, name: str, most: int) -> None:
        """Marks what is there as used now; of more than `most`, what was used longest ago goes."""
        with contextlib.suppress(OSError):
            if (self.path / name).exists():
                os.utime(self.path / name)
            for old in sorted(self.path.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)[most:]:
                if old.is_dir():
                    shutil.rmtree(old, ignore_errors=True)
                else:
                    old.unlink()


def _problem(folder: Path) -> str | None:
    """Why what is in a folder can't be trusted, or None."""
    if not hasattr(os, "getuid"):
        return "this system does not say who can write there"
    about = folder.lstat()
    if not stat.S_ISDIR(about.st_mode):
        return "it is a link, or no folder; remove it"
    if about.st_uid != os.getuid():
        return f"it belongs to user {about.st_uid}, and this is user {os.getuid()}"
    if about.st_mode & 0o077:
        return f"others may use it (mode {stat.S_IMODE(about.st_mode):04o}): remove it, or chmod 700"
    above = folder.parent.stat()
    if above.st_uid not in (os.getuid(), 0) or (above.st_mode & 0o022 and not above.st_mode & stat.S_ISVTX):
        return f"others may write in {folder.parent}: chmod go-w, or set JAXINFER_CACHE_DIR to another folder"
    kind = _file_system(folder)
    if kind.startswith(SHARED):
        return f"it is on a file system that other machines share ({kind}): set JAXINFER_CACHE_DIR to a local folder"
    return None


def _file_system(folder: Path) -> str:
    """Its type, as the system calls it; empty where it says none."""
    path = os.path.realpath(folder)
    mounts = [mount for mount in psutil.disk_partitions(all=True) if _within(path, mount.mountpoint)]
    return max(mounts, key=lambda mount: len(mount.mountpoint)).fstype.lower() if mounts else ""


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(os.path.join(folder, ""))
