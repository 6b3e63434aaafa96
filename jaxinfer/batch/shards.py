"""Which part of a job is this process's."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping


def parse_shard(given: str | None, environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """I and N of "I/N", where I counts from 0. Without it, on many hosts, those of a TPU slice (TPU_WORKER_ID,
    TPU_WORKER_HOSTNAMES) or of Slurm (SLURM_PROCID, SLURM_NTASKS); else 0 of 1. Raises ValueError."""
    if given is None:
        # Where there is no TPU, its library puts a warning into these variables.
        if (workers := environment.get("TPU_WORKER_HOSTNAMES")) and environment.get("TPU_WORKER_ID", "").isdigit():
            given = f"{environment['TPU_WORKER_ID']}/{len(workers.split(','))}"
        elif "SLURM_PROCID" in environment and "SLURM_NTASKS" in environment:
            given = f"{environment['SLURM_PROCID']}/{environment['SLURM_NTASKS']}"
        else:
            return 0, 1
    found = re.fullmatch(r"(\d{1,5})/(\d{1,5})", given)
    if not found or not int(found[1]) < int(found[2]):
        raise ValueError(f"shard is {given!r}: it must be I/N, with I from 0 to N-1, such as 0/4")
    return int(found[1]), int(found[2])
