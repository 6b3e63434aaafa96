"""Queries and documents to scores, by a model that reads both at once (a cross-encoder)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxinfer.checkpoint.cross_encoder import DEFAULT_ACTIVATION
from jaxinfer.engine.outputs import RerankResult, ScoringOutput, ScoringRequestOutput
from jaxinfer.engine.pooling.load import LoadedPooling
from jaxinfer.engine.pooling.packing import Row
from jaxinfer.errors import RequestError, UnsupportedError
from jaxinfer.tasks.classify import activated
from jaxinfer.tasks.embed import not_finite
from jaxinfer.tasks.pooling import PoolingTask

NO_SCORE = ScoringOutput(float("nan"))


class PairTask(PoolingTask[ScoringRequestOutput]):
    """Of a model with one class. Raises UnsupportedError for others."""

    pairs = True
    done = "Scored"

    def __init__(self, loaded: LoadedPooling):
        super().__init__(loaded)
        if loaded.size != 1:
            raise UnsupportedError(
                f"{loaded.folder}: it has {loaded.size} classes, and a score is of one: LLM.classify takes pairs, too"
            )
        assert loaded.pairs is not None
        self.activation = loaded.pairs.activation or DEFAULT_ACTIVATION

    def outputs(self, rows: list[Row], values: np.ndarray, options: bool) -> Iterator[ScoringRequestOutput]:
        """options: scores are after the activation."""
        scores = activated(self.activation if options else "Identity", values)[:, 0]
        for row, score in zip(rows, scores.tolist(), strict=True):
            error = None if np.isfinite(score) else not_finite("score")
            yield ScoringRequestOutput(row.place, row.ids, row.place, error, outputs=ScoringOutput(score))

    def failure(self, index: int, error: str) -> ScoringRequestOutput:
        return ScoringRequestOutput(-1, [], index, error, outputs=NO_SCORE)


def paired(queries: list[Any], documents: list[Any]) -> list[tuple[Any, Any]]:
    """Each query with its document, or one with all. Raises RequestError."""
    if len(queries) == 1:
        queries = queries * len(documents)
    if len(queries) != len(documents):
        raise RequestError.at("documents", f"{len(documents)} for {len(queries)} queries: give one each, or one query")
    return list(zip(queries, documents, strict=True))


def ranked(documents: list[Any], scores: list[float], top_n: int | None) -> list[RerankResult]:
    """The best first, of those that score the same the first one."""
    if top_n is not None and (not isinstance(top_n, int) or isinstance(top_n, bool) or top_n < 1):
        raise RequestError.at("top_n", f"{top_n!r:.100} must be an integer of at least 1")
    order = sorted(range(len(documents)), key=lambda i: -scores[i])
    return [RerankResult(i, scores[i], documents[i]) for i in order[:top_n]]
