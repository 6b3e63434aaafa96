"""The end of a job: its parts as one output."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import IO, Any

from jaxinfer.batch.formats import csv_body, csv_rows, is_table, packing_of, to_csv
from jaxinfer.batch.manifest import NAME, Manifest, differences, finished_path, read_manifest
from jaxinfer.batch.packing import packed, unpacked
from jaxinfer.batch.parquet import parquet_modules
from jaxinfer.batch.parts import Output
from jaxinfer.batch.summary import Summary
from jaxinfer.text.files import one_line

SUMS = ("parts", "rows", "errors", "prompt_tokens", "generated_tokens")
PIECE = 2**20  # bytes that are copied at a time
Joining = Generator[int, IO[bytes], None]  # takes parts that are open to read, gives how many rows each has


def finish(output: Output, manifest: Manifest) -> None:
    """Marks a shard as complete; where the output is one file and the shard is all, makes it of the parts."""
    manifest.complete = True
    if output.file is not None and manifest.shards == 1:
        _join([output] * manifest.parts, output, manifest)
    else:
        manifest.save(output)


def merge(output: str | os.PathLike[str], *others: str | os.PathLike[str]) -> Summary:
    """Makes one output of the shards of a job.

    output: where the shards wrote, or the first of their outputs; others: the rest, where each has its own. They stay
    as they are. Called again after it was killed, it goes on.
    Raises ValueError if a shard is missing or not complete, if they are of different jobs, or if a part is gone, and
    OSError if the output can't be written.
    """
    outputs = [Output(os.fspath(path)) for path in (output, *others)]
    target = outputs[0]
    done = target.path("_manifest.json") if target.file is None else finished_path(target)
    if target.fs.exists(done):
        merged = read_manifest(target, done)
        if not merged.complete:
            raise ValueError(f"{done}: is of a job without shards that is not complete: run it again")
        clean(target, merged)
    else:
        shards = _shards(outputs)
        format = shards[0][1].job["format"]
        if target.file is not None and target.format != format:
            raise ValueError(f"{target.file}: the shards are {format}; give a name that ends in .{format}, or a folder")
        for source in outputs:
            source.format = format
        numbers = {source.folder: source.numbers() for source in outputs}
        sources: list[Output] = []
        for part in range(shards[0][1].all_parts):  # as many as a manifest says
            source = shards[part % len(shards)][0]
            if part not in numbers[source.folder]:
                raise ValueError(
                    f"{source.part(part)}: is gone, and the manifest counts it; run its shard anew, in a new folder"
                )
            sources.append(source)
        sums: dict[str, Any] = {name: sum(getattr(manifest, name) for _, manifest in shards) for name in SUMS}
        columns = [manifest.others for _, manifest in shards if manifest.others]
        merged = replace(shards[0][1], shard=0, shards=1, others=columns[0] if columns else None, **sums)
        if target.file is not None:
            _join(sources, target, merged)
            return Summary.of(target, merged)
        target.make()
        for part, source in enumerate(sources):
            if source is not target:
                with source.fs.open(source.part(part), "rb") as part_file, target.whole(target.part(part)) as file:
                    shutil.copyfileobj(part_file, file, PIECE)
        merged.save(target)
    if target.file is None:
        target.remove([name for name in target.names() if NAME.fullmatch(name) and name != merged.name])
    return Summary.of(target, merged)


def _shards(outputs: Sequence[Output]) -> list[tuple[Output, Manifest]]:
    """All shards of a job and where they are."""
    shards: dict[int, tuple[Output, Manifest]] = {}
    for output in outputs:
        for name in output.names():
            if not NAME.fullmatch(name):
                continue
            path = output.path(name)
            manifest = read_manifest(output, path)
            if not manifest.complete:
                raise ValueError(f"{path}: this shard is not complete: run it again until it is")
            if manifest.shard in shards:
                raise ValueError(f"{path}: this shard is also in {shards[manifest.shard][0].folder}; name it once")
            shards[manifest.shard] = output, manifest
    if not shards:
        raise ValueError(f"{outputs[0].folder}: there are no shards of a batch job")
    first = min(shards.items())[1][1]
    for output, manifest in shards.values():
        different = differences(first.job, manifest.job)
        for name in ("shards", "input_rows", "columns"):
            different += differences(getattr(first, name), getattr(manifest, name), name)
        if different:
            raise ValueError(f"{output.path(manifest.name)}: is of another job: {'; '.join(different)}")
    missing = next((i for i in range(first.shards) if i not in shards), None)
    if missing is not None:
        raise ValueError(f"shard {missing}/{first.shards} is not there: run it, or name its output too")
    return [shards[i] for i in range(first.shards)]


def _join(sources: Sequence[Output], target: Output, manifest: Manifest) -> None:
    """Makes one file of all parts, in order, and removes the folder of parts. sources: where each part is.

    Raises ValueError naming a part that has not as many rows as were written.
    """
    assert target.file is not None
    assert manifest.input_rows is not None
    add = _parquet if target.format == "parquet" else _csv if is_table(target.format) else _lines
    with target.whole(target.file) as file, contextlib.closing(add(file, target.format, manifest)) as joined:
        next(joined)
        for part, source in enumerate(sources):
            name = source.part(part)
            try:
                with source.fs.open(name, "rb") as part_file:
                    rows = joined.send(part_file)
            except OSError:
                raise
            except Exception as error:  # of the packages that unpack it
                raise ValueError(f"{name}: is damaged ({one_line(error)}): run the job anew") from None
            expected = min(manifest.rows_per_part, manifest.input_rows - part * manifest.rows_per_part)
            if rows != expected:
                raise ValueError(f"{name}: has {rows} rows, and {expected} were written: run the job anew")
    manifest.write(target, finished_path(target))
    clean(target, manifest)


def _lines(file: IO[bytes], format: str, manifest: Manifest) -> Joining:
    rows = -1
    while True:
        part = yield rows
        content = part.read()
        rows = b"".join(unpacked(iter([content]), packing_of(format), "a part")).count(b"\n")
        file.write(content)  # several packed files are one


def _csv(file: IO[bytes], format: str, manifest: Manifest) -> Joining:
    columns = [*(manifest.columns or {})]
    wanted = [*columns, manifest.others] if manifest.others else columns
    file.write(packed(to_csv([], wanted), packing_of(format)))
    rows = -1
    while True:
        part = yield rows
        content = b"".join(unpacked(iter([part.read()]), packing_of(format), "a part"))
        rows = csv_rows(content)
        own = wanted if content.startswith(to_csv([], wanted)) else columns
        file.write(packed(csv_body(content, own, wanted), packing_of(format)))


def _parquet(file: IO[bytes], format: str, manifest: Manifest) -> Joining:
    pa, parquet = parquet_modules()
    writer: Any = None
    rows = -1
    try:
        while True:
            part = yield rows
            table = parquet.read_table(part)
            rows = table.num_rows
            if manifest.others and manifest.others not in table.column_names:
                table = table.append_column(manifest.others, pa.nulls(rows, pa.string()))
            writer = writer or parquet.ParquetWriter(file, table.schema)
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()


def clean(output: Output, manifest: Manifest) -> None:
    """Removes what is left beside a complete output by a process that was killed at the very end."""
    if output.file is None or manifest.shards > 1:
        output.remove([f".{manifest.name}.lock"])
    elif not output.names():
        return
    elif output.local:
        shutil.rmtree(output.folder, ignore_errors=True)  # another process may be at it too
    else:
        with contextlib.suppress(FileNotFoundError):
            output.fs.rm(output.folder, recursive=True)
