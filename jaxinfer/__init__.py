"""jaxinfer: TPU-first inference for large models, on JAX and XLA.

    import jaxinfer
    jaxinfer.generate("What is 27 + 45?")

Everything is imported when it is first used, so that `import jaxinfer` is fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxinfer.api import chat, embed, generate, stream, unload
    from jaxinfer.async_engine import AsyncEngine
    from jaxinfer.engine.outputs import (
        ClassificationRequestOutput,
        CompletionOutput,
        EmbeddingRequestOutput,
        Logprob,
        PoolingOutput,
        PoolingRequestOutput,
        RequestMetrics,
        RequestOutput,
        RerankResult,
        ScoreOutput,
        ScoringOutput,
        ScoringRequestOutput,
    )
    from jaxinfer.errors import (
        CheckpointError,
        ContextLengthError,
        EngineClosed,
        QueueFullError,
        RequestError,
        UnsupportedError,
    )
    from jaxinfer.llm import LLM
    from jaxinfer.sampling.params import SamplingParams
    from jaxinfer.sentence.pairs import CrossEncoder
    from jaxinfer.sentence.vectors import SentenceTransformer
    from jaxinfer.tasks.params import PoolingParams

__version__ = "0.1.0"

_HOME = {
    "LLM": "jaxinfer.llm",
    "AsyncEngine": "jaxinfer.async_engine",
    "SamplingParams": "jaxinfer.sampling.params",
    "RequestOutput": "jaxinfer.engine.outputs",
    "ScoreOutput": "jaxinfer.engine.outputs",
    "SentenceTransformer": "jaxinfer.sentence.vectors",
    "CrossEncoder": "jaxinfer.sentence.pairs",
    "PoolingParams": "jaxinfer.tasks.params",
    "EmbeddingRequestOutput": "jaxinfer.engine.outputs",
    "PoolingRequestOutput": "jaxinfer.engine.outputs",
    "PoolingOutput": "jaxinfer.engine.outputs",
    "ScoringRequestOutput": "jaxinfer.engine.outputs",
    "ScoringOutput": "jaxinfer.engine.outputs",
    "RerankResult": "jaxinfer.engine.outputs",
    "ClassificationRequestOutput": "jaxinfer.engine.outputs",
    "RequestMetrics": "jaxinfer.engine.outputs",
    "CompletionOutput": "jaxinfer.engine.outputs",
    "Logprob": "jaxinfer.engine.outputs",
    "RequestError": "jaxinfer.errors",
    "ContextLengthError": "jaxinfer.errors",
    "UnsupportedError": "jaxinfer.errors",
    "CheckpointError": "jaxinfer.errors",
    "EngineClosed": "jaxinfer.errors",
    "QueueFullError": "jaxinfer.errors",
    "generate": "jaxinfer.api",
    "stream": "jaxinfer.api",
    "chat": "jaxinfer.api",
    "embed": "jaxinfer.api",
    "unload": "jaxinfer.api",
}

__all__ = [
    "LLM",
    "AsyncEngine",
    "CheckpointError",
    "ClassificationRequestOutput",
    "CompletionOutput",
    "ContextLengthError",
    "CrossEncoder",
    "EmbeddingRequestOutput",
    "EngineClosed",
    "Logprob",
    "PoolingOutput",
    "PoolingParams",
    "PoolingRequestOutput",
    "QueueFullError",
    "RequestError",
    "RequestMetrics",
    "RequestOutput",
    "RerankResult",
    "SamplingParams",
    "ScoreOutput",
    "ScoringOutput",
    "ScoringRequestOutput",
    "SentenceTransformer",
    "UnsupportedError",
    "chat",
    "embed",
    "generate",
    "stream",
    "unload",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'jaxinfer' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
