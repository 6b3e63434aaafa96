"""Options of a model on several hosts, which commands share."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Annotated

import typer

from jaxinfer import distributed

HOSTS = "A model on several hosts: the same command on each of them (on a TPU pod, without these)"


@dataclass(frozen=True)
class HostOptions:
    """Where the other hosts are, and which one this is."""

    coordinator: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Where the others reach process 0; auto: as JAX finds it (TPU pods, Slurm, Open MPI).",
            rich_help_panel=HOSTS,
        ),
    ] = None
    num_processes: Annotated[
        int | None, typer.Option(metavar="N", help="How many there are.", rich_help_panel=HOSTS)
    ] = None
    process_id: Annotated[
        int | None,
        typer.Option(metavar="I", help="Which one this is, from 0 to N-1; 0 prints.", rich_help_panel=HOSTS),
    ] = None

    def join(self, unasked: bool = True) -> bool:
        """Joins the others, if there are any: those that are given, or (`unasked`) of a TPU pod. Whether this process
        follows, so that all that is left to it is to load the model. Raises ValueError and OSError."""
        arguments = None if self.coordinator == "auto" else self.coordinator, self.num_processes, self.process_id
        if self != HostOptions() or (unasked and distributed.on_tpu_pod()):
            distributed.initialize(*arguments)
        group = distributed.group()
        if group is None:
            if self.coordinator == "auto":
                raise ValueError(
                    "--coordinator auto: JAX finds no other hosts from here; give HOST:PORT, or leave it out"
                )
            return False
        _keep_stdout()
        return not group.leads


def _keep_stdout() -> None:
    """On CPU the library that connects the hosts prints to stdout, from C++: that goes to stderr from here on."""
    import jax

    out = sys.stdout
    if jax.default_backend() != "cpu" or out is None or not _writes_to(out, 1):
        return
    out.flush()
    ours = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = open(ours, "w", encoding=out.encoding, errors=out.errors, buffering=1 if out.isatty() else -1)  # noqa: SIM115


def _writes_to(stream: object, descriptor: int) -> bool:
    try:
        return stream.fileno() == descriptor  # type: ignore[attr-defined]
    except (OSError, AttributeError):
        return False
