"""Quantizing a weight by what goes through it, on the host. `jaxinfer/calibrate.py` collects that, layer by layer.

A weight is `[out, in]`, its input's samples `[tokens, in]`. All is deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxinfer.quantization.schemes import Scheme

Host = np.ndarray[Any, Any]
BLOCK = 128  # columns of GPTQ after which its errors are carried over to all others
DAMPING = 0.01  # of the Hessian, as a share of its mean diagonal
SHRINKS = np.linspace(1.0, 0.7, 13, dtype=np.float32)  # of the largest weight: what is beyond is clipped
RATIOS = np.linspace(0.0, 1.0, 21, dtype=np.float32)


def best_scales(weight: Host, importance: Host, scheme: Scheme, shrinks: Host = SHRINKS) -> Host:
    """Scales f32 `[out, groups]` that make the error least, weighed by each column's importance `[in]`: those of the
    largest weight, or less. importance: the mean square of its input."""
    rows, columns = weight.shape
    groups = weight.reshape(rows, -1, scheme.columns or columns)
    weights = importance.reshape(1, *groups.shape[1:])
    largest = np.maximum(np.abs(groups).max(axis=2, keepdims=True), np.finfo(np.float32).tiny * scheme.largest)
    best = largest / np.float32(scheme.largest)
    least = np.full((*best.shape[:2], 1), np.inf, np.float32)
    for shrink in shrinks:
        scale = largest * (shrink / np.float32(scheme.largest))
        error = np.sum((nearest(groups / scale, scheme) * scale - groups) ** 2 * weights, axis=2, keepdims=True)
        best = np.where(error < least, scale, best)
        least = np.minimum(error, least)
    return best[:, :, 0].astype(np.float32)


def nearest(scaled: Host, scheme: Scheme) -> Host:
    """The nearest values of a scheme, as float32."""
    if scheme.values.startswith("float8"):
        kind = np.dtype(getattr(ml_dtypes, scheme.values))
        return np.clip(scaled, -scheme.largest, scheme.largest).astype(kind).astype(np.float32)
    return np.clip(np.rint(scaled), -scheme.largest - (scheme.packed > 1), scheme.largest)


def times(values: Host, scales: Host) -> Host:
    """The weight that values `[..., out, in]` and scales `[..., out, groups]` stand for."""
    return values * np.repeat(scales, values.shape[-1] // scales.shape[-1], axis=-1)


def round_to_nearest(weight: Host, importance: Host, scheme: Scheme, shrinks: Host = SHRINKS) -> tuple[Host, Host]:
    """Values `[..., out, in]`, as float32, and scales `[..., out, groups]`."""
    if weight.ndim > 2:
        pairs = [round_to_nearest(matrix, importance, scheme, shrinks) for matrix in weight]
        return np.stack([values for values, _ in pairs]), np.stack([scales for _, scales in pairs])
    scales = best_scales(weight, importance, scheme, shrinks)
    return nearest(weight / np.repeat(scales, weight.shape[1] // scales.shape[1], axis=1), scheme), scales


class Carrying(NamedTuple):
    """How errors are carried from column to column.

    sizes: of the inputs, `[in]`.
    order: of columns, `[in]`.
    upper: f32 `[in, in]`, the upper factor of the inverse Hessian in that order, of which row i is how much later
        columns take over from column i.
    """

    sizes: Host
    order: Host
    upper: Host


def carrying(hessian: Host) -> Carrying:
    """Of the sum of the inputs' outer products, `[in, in]`: the same for all linears that have the input."""
    diagonal = np.diag(hessian).copy()
    order = np.argsort(-diagonal, kind="stable")
    damped = hessian[np.ix_(order, order)].astype(np.float64)
    damped[np.diag_indices(len(order))] += max(DAMPING * float(diagonal.mean()), 1e-8)
    # With its axes turned round, the lower factor becomes an upper one, whose inverse is what is looked for.
    upper = np.linalg.inv(np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1])
    return Carrying(diagonal, order, np.triu(upper).astype(np.float32))


def gptq(weight: Host, errors_go: Carrying, scheme: Scheme) -> tuple[Host, Host]:
    """As round_to_nearest; but what rounding a column does to the product is made up for by the columns after it.

    Source: Frantar et al., arXiv:2210.17323, with columns in the order of their inputs' size and scales that are set
    before.
    """
    columns = weight.shape[1]
    sizes, order, upper = errors_go
    scales = best_scales(weight, sizes, scheme)
    left = np.ascontiguousarray(weight.T[order], np.float32)  # a column is a row here, for speed
    by_column = np.repeat(scales.T, columns // scales.shape[1], axis=0)[order]
    values = np.empty_like(left)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        errors = np.empty((end - start, left.shape[1]), np.float32)
        for i in range(start, end):
            values[i] = nearest(left[i] / by_column[i], scheme)
            errors[i - start] = error = (left[i] - values[i] * by_column[i]) / upper[i, i]
            left[i + 1 : end] -= upper[i, i + 1 : end, None] * error
        left[end:] -= upper[start:end, end:].T @ errors
    rounded = np.empty_like(values)
    rounded[order] = values
    return np.ascontiguousarray(rounded.T), scales


def channel_factors(
    weights: Sequence[Host], sample: Host, scheme: Scheme, shared: tuple[int, int, int] | None = None
) -> Host:
    """By what each of the input's channels is divided, and each column multiplied, before quantizing weights: `[in]`.

    Of factors that grow with the channel's size, those that change the products of a sample least, or one. Where
    weights alone are quantized, size is the mean of the input (AWQ: Lin et al., arXiv:2306.00978). Where activations
    are too, it is the largest of the input, over that of the column (SmoothQuant: Xiao et al., arXiv:2211.10438).
    shared: channels as `[a, b, c]`, where those that differ in b alone have one factor.
    """
    magnitude = np.abs(sample).max(axis=0) if scheme.activations else np.abs(sample).mean(axis=0)
    columns = np.max([np.abs(weight).max(axis=0) for weight in weights], axis=0)
    if shared is not None:
        magnitude, columns = (
            np.broadcast_to(sizes.reshape(shared).max(axis=1, keepdims=True), shared).reshape(-1)
            for sizes in (magnitude, columns)
        )
    magnitude, columns = np.maximum(magnitude, 1e-5), np.maximum(columns, 1e-5)
    importance = np.mean(np.square(sample), axis=0)
    exact = [sample @ weight.T for weight in weights]
    candidates = [np.ones_like(magnitude)]
    for ratio in RATIOS:
        factors = magnitude**ratio / (columns ** (1 - ratio) if scheme.activations else 1)
        candidates.append(factors / np.sqrt(factors.max() * factors.min()))

    def error(factors: Host) -> float:
        x, total = rounded_input(sample / factors, scheme), 0.0
        for weight, product in zip(weights, exact, strict=True):
            rounded = times(*round_to_nearest(weight * factors, importance / factors**2, scheme, SHRINKS[:1]))
            total += float(np.sum(np.square(x @ rounded.T - product)))
        return total

    return min(candidates, key=error).astype(np.float32)


def rounded_input(x: Host, scheme: Scheme) -> Host:
    """What a scheme makes of activations `[tokens, in]`."""
    if not scheme.activations:
        return x
    scales = np.maximum(np.abs(x).max(axis=1, keepdims=True), np.finfo(np.float32).tiny * 127) / 127
    return np.rint(x / scales) * scales
