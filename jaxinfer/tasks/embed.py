"""Texts to vectors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jaxinfer.engine.outputs import EmbeddingOutput, EmbeddingRequestOutput
from jaxinfer.engine.pooling.packing import Row
from jaxinfer.errors import RequestError
from jaxinfer.sampling.ids import is_id
from jaxinfer.tasks.pooling import PoolingTask


class VectorOptions(NamedTuple):
    """What becomes of vectors.

    dimensions: they are cut to so many; None: they are not.
    normalize: to length 1, after that.
    """

    dimensions: int | None
    normalize: bool


WHOLE = VectorOptions(None, False)  # as the model has them


class EmbedTask(PoolingTask[EmbeddingRequestOutput]):
    """Of a model that embeds."""

    done = "Embedded"

    def options(self, dimensions: int | None, normalize: bool | None) -> VectorOptions:
        """What isn't given is as the checkpoint says. Raises RequestError."""
        size, trained = self.loaded.size, self.loaded.config.get("matryoshka_dimensions")
        assert self.loaded.sentence is not None
        if normalize not in (None, True, False):
            raise RequestError.at("normalize", f"{normalize!r:.100} is neither true nor false")
        if dimensions is not None:
            if not is_id(dimensions) or not 1 <= dimensions <= size:
                raise RequestError.at("dimensions", f"{dimensions!r:.100} is not from 1 to {size}, which vectors have")
            if isinstance(trained, list) and dimensions not in trained and dimensions != size:
                raise RequestError.at(
                    "dimensions", f"{dimensions} is none of {trained}, which the model is trained for"
                )
        cut = self.loaded.sentence.dimensions if dimensions is None else dimensions
        return VectorOptions(cut, self.loaded.normalizes if normalize is None else normalize)

    def outputs(self, rows: list[Row], values: np.ndarray, options: VectorOptions) -> Iterator[EmbeddingRequestOutput]:
        for row, vector in zip(rows, finished(values, options), strict=True):
            outputs = EmbeddingOutput(np.ascontiguousarray(vector))
            error = None if np.isfinite(vector).all() else not_finite("vector")
            yield EmbeddingRequestOutput(row.place, row.ids, row.place, error, outputs=outputs)

    def failure(self, index: int, error: str) -> EmbeddingRequestOutput:
        nothing = EmbeddingOutput(np.zeros(0, np.float32))
        return EmbeddingRequestOutput(-1, [], index, error, outputs=nothing)


def finished(vectors: np.ndarray, options: VectorOptions) -> np.ndarray:
    """Vectors f32[N, D], cut to their first dimensions, as Matryoshka models (Kusupati et al., arXiv:2205.13147) are
    trained for, and normalized, which has to come after the cut."""
    vectors = vectors[:, : options.dimensions]
    return normalized(vectors) if options.normalize else vectors


def normalized(vectors: np.ndarray) -> np.ndarray:
    """To length 1, `[..., D]`."""
    unit: np.ndarray = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), np.float32(1e-12))
    return unit


def not_finite(what: str) -> str:
    """What is said of a model that computes no numbers."""
    return (
        f"the model's {what} is NaN or infinite: its weights are damaged, or exceed what the dtype can hold; try "
        'dtype="float32"'
    )
