"""The backends in order, and which of them is taken: the first one that supports a case."""

from __future__ import annotations

from collections.abc import Iterator

from jaxinfer.attention.backend import AttentionBackend, AttentionCase
from jaxinfer.attention.cpu import CPU
from jaxinfer.attention.fused import FUSED
from jaxinfer.attention.gpu import GPU
from jaxinfer.attention.paged import PAGED
from jaxinfer.attention.tpu import TPU
from jaxinfer.attention.tpu_xla import XLA_ON_TPU
from jaxinfer.attention.xla import XLA

# Plain XLA is last, runs everywhere, and is the oracle for all others.
BACKENDS: tuple[AttentionBackend, ...] = (PAGED, FUSED, TPU, GPU, CPU, XLA_ON_TPU, XLA)


def choose(case: AttentionCase, attention: str = "auto", kv_cache_dtype: str = "auto") -> AttentionBackend:
    """The first backend that option `attention` allows and that is for the case: see EngineConfig. Raises ValueError
    if a kernel, or a quantized cache, is asked for where it can't be."""
    allowed = [backend for backend in BACKENDS if attention in backend.asked]
    able = [backend for backend in allowed if backend.supports(case) is None]
    if not able:
        problem = next((b for b in allowed if b.platform == case.device.platform), allowed[-1]).supports(case)
        raise ValueError(f"attention is {attention!r}: {problem}; leave it out to have what applies")
    chosen = next((backend for backend in able if backend.refusal(case) is None), None)
    if chosen is None:
        raise ValueError(f"kv_cache_dtype is {kv_cache_dtype!r}: {able[0].refusal(case)}")
    return chosen


def reasons(case: AttentionCase, attention: str = "auto") -> Iterator[tuple[AttentionBackend, str | None]]:
    """Of each backend why it is not used for the case; None for the one that is."""
    chosen = choose(case, attention)
    for backend in BACKENDS:
        after = f"{chosen.name} comes before it" if BACKENDS.index(backend) > BACKENDS.index(chosen) else None
        yield backend, None if backend is chosen else _reason(backend, case, attention) or after


def in_words(backend: AttentionBackend, case: AttentionCase, attention: str = "auto") -> str:
    """The backend, and where it is plain XLA, why."""
    return (
        f"{backend.name}: {_reason(_native(case), case, attention)}" if backend in (XLA, XLA_ON_TPU) else backend.name
    )


def _reason(backend: AttentionBackend, case: AttentionCase, attention: str) -> str | None:
    """Why it isn't taken there, whatever else is."""
    problem = backend.supports(case) or backend.refusal(case)
    if problem is None and attention not in backend.asked:
        return f"attention is {attention!r}" if attention != "auto" else _ASKED
    return problem


_ASKED = "the kernel is taken with attention='pallas' alone"


def _native(case: AttentionCase) -> AttentionBackend:
    """What is for just such devices, and of two of them the less particular one."""
    return next((backend for backend in (PAGED, CPU) if backend.platform == case.device.platform), GPU)
