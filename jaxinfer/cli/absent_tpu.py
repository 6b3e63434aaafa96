"""A machine that has libtpu and no TPU, where plans are made, say."""

from __future__ import annotations

import os
from collections.abc import Iterable
from glob import glob
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

# Chips of TPUs, by their drivers, and what other accelerators are reached by.
DEVICES = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia*", "/dev/dxg", "/dev/kfd")
PCI_VENDORS = "/sys/bus/pci/devices/*/vendor"
GOOGLE = "0x1ae0"
SAID = ("JAX_PLATFORMS", "JAX_FORCE_TPU_INIT", "TPU_", "LIBTPU_", "PJRT_")  # names in the environment, as they begin


def leave_absent_tpu_alone() -> None:
    """Before JAX starts: it would start libtpu, which complains that it finds no TPU as if that were an error. Where
    there may be a TPU or another accelerator, or somebody has said which to use, JAX finds out by itself."""
    if find_spec("libtpu") is None or any(name.startswith(SAID) for name in os.environ):
        return
    if any(map(glob, DEVICES)) or any(read == GOOGLE for read in _vendors()):
        return
    if find_spec("jax_plugins") is None and not entry_points(group="jax_plugins"):
        os.environ["JAX_PLATFORMS"] = "cpu"


def _vendors() -> Iterable[str]:
    for path in glob(PCI_VENDORS):
        try:
            yield Path(path).read_text().strip()
        except OSError:
            yield GOOGLE  # nobody knows
