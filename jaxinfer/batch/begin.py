"""The beginning of a job: what its output holds already."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import fsspec

from jaxinfer.batch.formats import Format
from jaxinfer.batch.manifest import NAME, AnotherJob, Manifest, finished_path, read_manifest
from jaxinfer.batch.parts import Output, temporary_name
from jaxinfer.batch.sources import Source

_TEMPORARY = re.compile(r"\..*\.tmp|\..*\.lock")
_PART = re.compile(rf"part-(\d{{5,}})\.(?:{'|'.join(map(re.escape, get_args(Format)))})")


def open_job(output: Output, shard: int, shards: int, job: Mapping[str, Any]) -> Manifest:
    """The shard's manifest with the job in it, a new one if the job is new here. Nothing is written.

    Raises AnotherJob for an output that this job can't go on with, ValueError for one that is somebody else's.
    """
    problem = None
    while True:
        try:
            manifest = _find(output, shard, shards)
            manifest.take(job, output)
            manifest.check_parts(output)
            return manifest
        except (ValueError, FileNotFoundError) as error:
            # It may have been seen while another process wrote it, or made one file of the parts: then it looks
            # otherwise now.
            if str(error) == problem:
                raise
            problem = str(error)


def begin_anew(output: Output, shards: int, job: Mapping[str, Any]) -> Manifest:
    """A new manifest, in place of all that is there of another job. The folder is there, and locked.

    Killed in between and called again, this goes on. Raises ValueError where the output has what no job has written.
    """
    if shards > 1:
        raise ValueError(
            f"{output.name}: holds another job, and shards can't overwrite it: remove it before they start"
        )
    _check_names(output)
    manifest = Manifest(job=dict(job))
    manifest.save(output)
    if output.file is not None:
        for path in (finished_path(output), output.file):
            if output.fs.exists(path):
                output.fs.rm_file(path)
    tidy(output, manifest)
    output.remove([name for name in output.names() if NAME.fullmatch(name) and name != manifest.name])
    return manifest


def tidy(output: Output, manifest: Manifest) -> None:
    """Removes what a process that was killed has left: temporaries, and parts that are not counted. The folder is
    locked."""
    stale = []
    for name in output.names():
        match = _PART.fullmatch(re.sub(r"^\.(.*)\.tmp$", r"\1", name))
        if match and int(match[1]) % manifest.shards == manifest.shard:
            counted = int(match[1]) < manifest.next_part and not name.startswith(".")
            stale += [] if counted and name.endswith(f".{output.format}") else [name]
    output.remove([*stale, temporary_name(manifest.name)])


def check_apart(output: Output, sources: Sequence[Source]) -> None:
    """Raises ValueError if an input is the output, or within it."""
    real = os.path.realpath if output.local else str
    for source in sources:
        fs, path = fsspec.core.url_to_fs(source.url)
        for target in (output.file, output.folder):
            if target and type(fs) is type(output.fs) and f"{real(path)}/".startswith(f"{real(target)}/"):
                raise ValueError(f"input {source.name}: is the output, or within it; give another output")


def _find(output: Output, shard: int, shards: int) -> Manifest:
    wanted = Manifest(shard, shards)
    if output.file is not None and output.fs.exists(done := finished_path(output)):
        return read_manifest(output, done)
    names = output.names()
    if shards > 1 and "_manifest.json" in names:
        merged = read_manifest(output, output.path("_manifest.json"))
        if merged.complete:
            return merged
    manifests = {name: match for name in names if (match := NAME.fullmatch(name))}
    others = [name for name, match in manifests.items() if int(match[2] or 1) != shards]
    if others:
        raise AnotherJob(
            f"{output.folder}: {others[0]} says that the job has other shards than --shard {shard}/{shards}"
        )
    if not manifests:
        _check_names(output)
        if output.file is not None and output.fs.exists(output.file):
            raise AnotherJob(
                f"{output.file}: is there already, and not of a batch job: give a new name, or --overwrite it"
            )
    return read_manifest(output, output.path(wanted.name)) if wanted.name in manifests else wanted


def _check_names(output: Output) -> None:
    names = output.names()
    of_job = any(map(NAME.fullmatch, names))
    for name in names:
        if not (NAME.fullmatch(name) or _TEMPORARY.fullmatch(name) or (of_job and _PART.fullmatch(name))):
            raise ValueError(f"{output.folder}: not empty, and not of a batch job ({name}): give a new folder")
