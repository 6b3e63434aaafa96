"""Memory that glibc keeps for the next call."""

import os
import subprocess
import sys

import pytest

from jaxinfer import LLM
from jaxinfer.demo import ENCODER_DIR, MODEL_DIR
from jaxinfer.engine.malloc import VARIABLES

PROGRAM = """
import ctypes, resource, sys
from jaxinfer.engine.malloc import keep_memory, trim_memory
libc, size = ctypes.CDLL(None), 50 * 2**20
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
lost = [faults(), faults()][1]
keep_memory()
kept = [faults(), faults()][1]
trim_memory()
print(lost, kept, faults())
"""


def faults(**variables):
    environment = {name: value for name, value in os.environ.items() if name not in (*VARIABLES, "GLIBC_TUNABLES")}
    run = [sys.executable, "-c", PROGRAM]
    out = subprocess.run(run, env=environment | variables, capture_output=True, text=True, check=True).stdout
    return map(int, out.split())


def test_memory_is_kept():
    """A block larger than glibc keeps by itself is filled by the system once, not each time."""
    lost, kept, trimmed = faults()
    assert kept < lost / 10
    assert trimmed > lost / 2


@pytest.mark.parametrize("variable", ["MALLOC_TRIM_THRESHOLD_=4096", "GLIBC_TUNABLES=glibc.malloc.trim_threshold=4096"])
def test_what_the_user_says_of_malloc_is_left(variable):
    name, value = variable.split("=", 1)
    lost, kept, _ = faults(**{name: value})
    assert kept > lost / 2


@pytest.mark.parametrize("folder", [MODEL_DIR, ENCODER_DIR])
def test_models_on_a_cpu_keep_memory(folder, monkeypatch):
    calls = []
    monkeypatch.setattr("jaxinfer.engine.ready.keep_memory", lambda: calls.append("kept"))
    with LLM(folder, max_model_len=64):
        assert calls == ["kept"]
