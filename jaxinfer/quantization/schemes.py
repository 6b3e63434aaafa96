"""The schemes by name, and which weights a user wants in which. No JAX here: options are checked before JAX starts."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass

Quantization = str | Mapping[str, str]


@dataclass(frozen=True)
class Scheme:
    """How a weight `[out, in]` is kept: values with one scale for each output channel.

    values: their dtype. largest: what the largest weight of a channel becomes. activations: those that the weight is
    multiplied with are quantized too, to int8 with a scale for each token, and products are summed in int32.
    """

    name: str
    values: str
    largest: float
    activations: bool = False


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("int8", "int8", 127.0),
        Scheme("int8-w8a8", "int8", 127.0, activations=True),
        Scheme("fp8", "float8_e4m3fn", 448.0),
    )
}
NONE = "none"


def check_quantization(quantization: object) -> None:
    """Raises ValueError unless it is None, the name of a scheme, or names of schemes by pattern of weight names."""
    names = ", ".join(SCHEMES)
    if quantization is None or (isinstance(quantization, str) and quantization in SCHEMES):
        return
    if isinstance(quantization, Mapping) and quantization:
        for pattern, name in quantization.items():
            if not isinstance(pattern, str) or name not in (*SCHEMES, NONE):
                raise ValueError(f"quantization has {pattern!r}: {name!r}: it must be one of {names}, {NONE}")
        return
    raise ValueError(
        f"quantization is {quantization!r}: it must be one of {names}, or patterns of weight names with one each"
    )


def scheme_of(quantization: Quantization | None, weight: str, looked_up: bool) -> Scheme | None:
    """The scheme of a matrix. A name is for all that are multiplied with, and not for tables that are `looked_up`; of
    patterns (`*.mlp.*`, as in a shell) the first that fits decides, for tables too."""
    if quantization is None or isinstance(quantization, str):
        return None if quantization is None or looked_up else SCHEMES[quantization]
    return next((SCHEMES.get(n) for pattern, n in quantization.items() if fnmatch.fnmatchcase(weight, pattern)), None)
