"""How near vectors are to each other, and vectors of fewer bits. Definitions are those of sentence-transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxinfer.errors import RequestError
from jaxinfer.tasks.embed import normalized

# Of [..., A, 1, D] and [..., 1, B, D], or of rows one by one.
DISTANCES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "euclidean": lambda x: np.sqrt(np.sum(x * x, axis=-1)),
    "manhattan": lambda x: np.sum(np.abs(x), axis=-1),
}
PRECISIONS = ("float32", "int8", "uint8", "binary", "ubinary")


def vectors_of(x: Any, rows: bool = True) -> np.ndarray:
    """f32[N, D] of what may be lists; rows: of a single one, too. Raises RequestError."""
    try:
        array = np.asarray(x, np.float32)
    except (TypeError, ValueError):
        raise RequestError(f"vectors are numbers, all as many, and not {x!r:.80}", "embeddings") from None
    if array.ndim == 1 and rows:
        array = array[None]
    if array.ndim not in (1, 2) or (rows and array.ndim != 2):
        raise RequestError(f"vectors are given as one of {array.ndim} dimensions: give [D], or [N, D]", "embeddings")
    return array


def similarity(name: str, a: Any, b: Any) -> np.ndarray:
    """f32[A, B] of vectors [A, D] and [B, D]: cosine, dot, euclidean or manhattan; distances are negative."""
    a, b = vectors_of(a), vectors_of(b)
    _check_widths(a, b)
    if name in DISTANCES:
        return np.stack([-DISTANCES[name](row - b) for row in a]) if len(a) else np.zeros((0, len(b)), np.float32)
    product: np.ndarray = normalized(a) @ normalized(b).T if name == "cosine" else a @ b.T
    return product


def pairwise_similarity(name: str, a: Any, b: Any) -> np.ndarray:
    """f32[N] of vectors [N, D] and [N, D]."""
    a, b = vectors_of(a, rows=False), vectors_of(b, rows=False)
    _check_widths(a, b)
    if a.ndim == b.ndim == 2 and len(a) != len(b) and 1 not in (len(a), len(b)):
        raise RequestError(f"{len(a)} vectors and {len(b)} are no pairs: give as many of each", "embeddings")
    if name in DISTANCES:
        return -DISTANCES[name](a - b)
    a, b = (normalized(a), normalized(b)) if name == "cosine" else (a, b)
    products: np.ndarray = np.sum(a * b, axis=-1)
    return products


def _check_widths(a: np.ndarray, b: np.ndarray) -> None:
    """Raises RequestError."""
    if a.shape[-1] != b.shape[-1]:
        wrong = f"vectors of {a.shape[-1]} dimensions and of {b.shape[-1]} can't be compared: cut none of them, or all"
        raise RequestError(wrong, "embeddings")


def quantized(vectors: np.ndarray, precision: str) -> np.ndarray:
    """Vectors f32[N, D] as int8 or uint8 `[N, D]`, between each dimension's least and largest value among them, or as
    signs, eight in a byte: binary (int8) or ubinary (uint8) `[N, D/8]`. Raises RequestError."""
    if precision not in PRECISIONS:
        raise RequestError.at("precision", f"{precision!r:.100} is none of {', '.join(PRECISIONS)}")
    if precision == "float32":
        return vectors.astype(np.float32)
    if precision == "ubinary":
        return np.packbits(vectors > 0, axis=-1)
    if precision == "binary":
        return (np.packbits(vectors > 0, axis=-1) - 128).astype(np.int8)
    if len(vectors) < 2:
        raise RequestError.at(
            "precision", f"{precision} is between the least and the largest of several vectors: give more than one text"
        )
    least, most = vectors.min(axis=0), vectors.max(axis=0)
    step = (most - least) / 255
    levels = np.clip(np.floor((vectors - least) / np.where(step == 0, 1, step)), 0, 255)
    return levels.astype(np.uint8) if precision == "uint8" else (levels - 128).astype(np.int8)
