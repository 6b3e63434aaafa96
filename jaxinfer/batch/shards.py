"""Which part of a job is this process's."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping


def parse_shard(shard: str | None, environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """I and N of "I/N", where I counts from 0. Without it, on many hosts, those of a TPU slice (TPU_WORKER_ID,
    TPU_WORKER_HOSTNAMES) or of Slurm (SLURM_PROCID, SLURM_NTASKS); else 0 of 1. Raises ValueError."""
    if shard is None:
        # Where there is no TPU, its library puts a warning into these variables.
        if (workers := environment.get("TPU_WORKER_HOSTNAMES")) and environment.get("TPU_WORKER_ID", "").isdigit():
            shard = f"{environment['TPU_WORKER_ID']}/{len(workers.split(','))}"
        elif "SLURM_PROCID" in environment and "SLURM_NTASKS" in environment:
            shard = f"{environment['SLURM_PROCID']}/{environment['SLURM_NTASKS']}"
        else:
            return 0, 1
    match = re.fullmatch(r"(\d{1,5})/(\d{1,5})", shard)
    if not match or not int(match[1]) < int(match[2]):
        raise ValueError(f"shard is {shard!r}: it must be I/N, with I from 0 to N-1, such as 0/4")
    return int(match[1]), int(match[2])
