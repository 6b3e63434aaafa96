"""What a job is, and how much of it is done: a small JSON file beside the parts."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

from jaxinfer.batch.formats import Format
from jaxinfer.batch.parts import Output

FORMAT = 2
# Who reads a folder of Parquet files leaves out names that begin with an underscore.
NAME = re.compile(r"_manifest(?:-(\d{5,})-of-(\d{5,}))?\.json")


REMEDY = "give another output, or the old job, or --overwrite it"
ANEW = "remove the output, or --overwrite it, to begin anew"


class AnotherJob(ValueError):
    """The output holds something that this job can't go on with."""


@dataclass
class Manifest:
    """`_manifest.json`, or `_manifest-00001-of-00004.json` of shard 1 of 4 (the first is 0).

    It is the truth: it is written after each part, and a part that it does not count is written again.

    shard, shards: which shard, from 0, of how many.
    job: what the output depends on.
    parts: how many of this shard's are finished.
    rows, errors, prompt_tokens, generated_tokens: what is in them.
    columns: of a table's parts, with their kinds; None until they are known, and of what is no table.
    others: of those parts that have one, the column of what fits nowhere else.
    input_rows: how many rows the input has, as soon as that is known.
    complete: all parts of this shard are there (and the file made of them, where the output is one that is not
        sharded).
    """

    shard: int = 0
    shards: int = 1
    job: dict[str, Any] = field(default_factory=dict)
    parts: int = 0
    rows: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    columns: dict[str, Any] | None = None
    others: str | None = None
    input_rows: int | None = None
    complete: bool = False

    @property
    def name(self) -> str:
        return "_manifest.json" if self.shards == 1 else f"_manifest-{self.shard:05d}-of-{self.shards:05d}.json"

    @property
    def rows_per_part(self) -> int:
        return int(self.job["rows_per_part"])

    @property
    def all_parts(self) -> int:
        """Of all shards, once the input's rows are known. There is a part 0 even if there are no rows."""
        return max(1, math.ceil((self.input_rows or 0) / self.rows_per_part))

    @property
    def finished(self) -> bool:
        """Whether all parts of this shard are written."""
        return self.input_rows is not None and self.next_part >= self.all_parts

    @property
    def next_part(self) -> int:
        """The number of the first part that is not finished."""
        return self.shard + self.parts * self.shards

    def save(self, output: Output) -> None:
        """Writes it, all of it or nothing."""
        self.write(output, output.path(self.name))

    def write(self, output: Output, path: str) -> None:
        output.write(path, (json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n").encode())

    def take(self, job: Mapping[str, Any], output: Output) -> None:
        """Takes `job`, or fields of it, as what the output depends on. As long as no part is written that may be
        another job than it was, and until the last part is written the input may have further files at the end.

        Raises AnotherJob naming what differs."""
        job = json.loads(json.dumps(job))
        changes = differences(self.job, job)
        if not self.parts and not self.complete:
            self.columns = self.input_rows = None
        elif (
            changes
            and not (self.finished or self.complete)
            and not differences(self.job, {**job, **_shortened(self.job, job)})
        ):
            self.input_rows = None
        elif changes:
            raise AnotherJob(f"{output.name}: holds another job: {'; '.join(changes)}; {REMEDY}")
        self.job |= job

    def check_file(self) -> None:
        """Raises ValueError for fields of a file that can't be, or not beside each other."""
        if not isinstance(self.job, dict):
            raise ValueError(f"job is {self.job!r:.80}")
        if self.job["format"] not in get_args(Format):  # it ends the names of parts
            raise ValueError(f"format is {self.job['format']!r:.80}")
        names = ("shard", "parts", "rows", "errors", "prompt_tokens", "generated_tokens")
        counts: dict[str, tuple[Any, int]] = {name: (getattr(self, name), 0) for name in names}
        counts |= {"shards": (self.shards, 1), "rows_per_part": (self.job["rows_per_part"], 1)}
        counts["input_rows"] = 0 if self.input_rows is None else self.input_rows, 0
        for name, (value, least) in counts.items():
            if type(value) is not int or not least <= value < 2**63:
                raise ValueError(f"{name} is {value!r:.80}")
        if not isinstance(self.complete, bool) or not isinstance(self.columns, dict | None):
            raise ValueError(f"complete is {self.complete!r:.80}, columns is {self.columns!r:.80}")
        if not isinstance(self.others, str | None):
            raise ValueError(f"others is {self.others!r:.80}")
        if self.shard >= self.shards or not self.errors <= self.rows <= self.parts * self.rows_per_part:
            raise ValueError(
                f"shard {self.shard} of {self.shards}, with {self.errors} errors in {self.rows} rows of {self.parts} "
                f"parts of {self.rows_per_part}"
            )

    def check_parts(self, output: Output) -> None:
        """Raises AnotherJob naming a finished part that is not there any more."""
        if self.complete and output.file is not None and self.shards == 1:
            if not output.fs.exists(output.file):
                raise AnotherJob(f"{output.file}: is gone, and {finished_path(output)} counts it; {ANEW}")
            return
        there = output.numbers()
        gone = next((part for part in range(self.shard, self.next_part, self.shards) if part not in there), None)
        if gone is not None:
            raise AnotherJob(f"{output.part(gone)}: is gone, and the manifest counts it; {ANEW}")


def read_manifest(output: Output, path: str) -> Manifest:
    """Raises AnotherJob for a file that is not a manifest of this version."""
    try:
        content = json.loads(output.fs.cat_file(path))
        if content.pop("format") != FORMAT:
            raise ValueError("of another version of jaxinfer")
        manifest = Manifest(**content)
        manifest.check_file()
        return manifest
    except FileNotFoundError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise AnotherJob(f"{path}: not a manifest that can be read ({error}); {ANEW}") from None


def finished_path(output: Output) -> str:
    """Where the manifest is once one file has been made of the parts."""
    assert output.file is not None
    return f"{output.file}.manifest.json"


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """What differs between two jobs, in words. Fields that only one of the jobs has don't count at the top."""
    if where == "inputs":
        return _input_differences(old, new)
    if isinstance(old, dict) and isinstance(new, dict):
        names = old.keys() & new.keys() if not where else old.keys() | new.keys()
        parts = [differences(old.get(n), new.get(n), f"{where}.{n}" if where else n) for n in sorted(names)]
        return [difference for part in parts for difference in part]
    return [] if old == new else [f"{where} was {json.dumps(old)} and is {json.dumps(new)}"]


def _shortened(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The new job's input files without those that come after as many as the old job had."""
    return {"inputs": new["inputs"][: len(old["inputs"])]} if "inputs" in old and "inputs" in new else {}


def _input_differences(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[str]:
    names = [[os.path.basename(file["name"]) for file in files] for files in (old, new)]
    if names[0] != names[1]:
        gone, added = (sorted(set(a) - set(b)) for a, b in (names, names[::-1]))
        changes = [f"{n} is {w}" for w, files in (("no longer there", gone), ("new", added)) for n in files]
        return [f"the input files were others ({', '.join(changes[:3]) or 'their order'})"]
    return [
        f"{b['name']} has changed since (it had {a['size']} bytes, and has {b['size']})"
        for a, b in zip(old, new, strict=True)
        if a["fingerprint"] != b["fingerprint"]
    ]
