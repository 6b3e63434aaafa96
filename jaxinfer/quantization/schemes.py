"""The schemes by name, and which weights a user wants in which. No JAX here: options are checked before JAX starts."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass

Quantization = str | Mapping[str, str]

_FP4 = (0, 0.0625, 8, 12, 4, 6, 2, 3)  # a sign, two bits of exponent and one of mantissa; the largest becomes one
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# What values of four bits stand for. Of a block whose largest is one, nf4 are quantiles of the normal distribution
# (Dettmers et al., arXiv:2305.14314, appendix E), and fp4 is bitsandbytes' own; e2m1 is that of the Open Compute
# Project's microscaling formats (OCP MX 1.0).
TABLES: dict[str, tuple[float, ...]] = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": (*(value / 12 for value in _FP4), *(-value / 12 for value in _FP4)),
    "e2m1": (*_E2M1, *(-value for value in _E2M1)),
}


@dataclass(frozen=True)
class Scheme:
    """How a weight `[out, in]` is kept: values, and scales that each belong to a block of them.

    name: as users have it.
    values: their dtype.
    largest: what the largest weight of a block becomes.
    rows, columns: of a block; columns 0: all of them, one scale for each output channel.
    packed: how many values a byte has: 2 are two's complement, that of the even column in the low four bits.
    zeros: what is scaled is the value less the block's zero point, int8; only checkpoints have them.
    biases: to what is scaled the block's bias is added, float32; only checkpoints have them.
    table: of TABLES, whose numbers are scaled: values are places in it, unsigned.
    scales: their dtype; float8_e8m0fnu has powers of two alone.
    activations: those that the weight is multiplied with are quantized too, to int8 with a scale for each token, and
        products are summed in int32.
    """

    name: str
    values: str
    largest: float
    rows: int = 1
    columns: int = 0
    packed: int = 1
    zeros: bool = False
    biases: bool = False
    table: str = ""
    scales: str = "float32"
    activations: bool = False

    def arrays(self, *shape: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of what a weight `[..., out, in]` is kept as, by what is added to its name. Raises
        ValueError."""
        *first, rows, columns = shape
        groups = -(-columns // self.columns) if self.columns else 1
        if columns % self.packed or (self.rows == 1 and columns % (self.columns or 1)):
            raise ValueError(f"groups of {self.columns} don't divide the {columns} inputs, as {self.name} needs")
        blocks = *first, -(-rows // self.rows), groups
        values = *first, rows, columns // self.packed
        arrays: dict[str, tuple[tuple[int, ...], str]] = {"": (values, self.values), SCALE: (blocks, self.scales)}
        kinds = {ZERO: "int8", BIAS: "float32"}
        return arrays | {suffix: (blocks, kinds[suffix]) for suffix in self.companions[1:]}

    @property
    def companions(self) -> tuple[str, ...]:
        """What is added to a weight's name for the arrays of its blocks."""
        return (SCALE, *([ZERO] if self.zeros else []), *([BIAS] if self.biases else []))

    @property
    def block(self) -> tuple[int, int]:
        """How many outputs and inputs have to stay together."""
        return self.rows, self.columns or 1


SCALE = "_scale"  # NAME_scale has the scales of NAME; compressed-tensors calls them so, too
ZERO = "_zero"
BIAS = "_bias"
SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("int8", "int8", 127.0),
        Scheme("int8-w8a8", "int8", 127.0, activations=True),
        Scheme("int4", "uint8", 7.0, columns=32, packed=2),
        Scheme("int4-g128", "uint8", 7.0, columns=128, packed=2),
        Scheme("nf4", "uint8", 1.0, columns=64, packed=2, table="nf4"),
        Scheme("mxfp4", "uint8", 6.0, columns=32, packed=2, table="e2m1", scales="float8_e8m0fnu"),
        Scheme("fp8", "float8_e4m3fn", 448.0),
        Scheme("fp8-block", "float8_e4m3fn", 448.0, rows=128, columns=128),
    )
}
NONE = "none"
# vLLM's names for what a checkpoint may be quantized by already, and what its config.json calls it.
METHODS = {
    "awq": "awq",
    "awq_marlin": "awq",
    "gptq": "gptq",
    "gptq_marlin": "gptq",
    "compressed-tensors": "compressed-tensors",
    "fp8": "fp8",
    "bitsandbytes": "bitsandbytes",
    "mxfp4": "mxfp4",
}


def check_quantization(quantization: object) -> None:
    """Raises ValueError unless it is None, the name of a scheme or of a checkpoint's method, or names of schemes by
    pattern of weight names."""
    names = ", ".join(SCHEMES)
    if quantization is None or (isinstance(quantization, str) and quantization in (*SCHEMES, *METHODS)):
        return
    if isinstance(quantization, Mapping) and quantization:
        for pattern, name in quantization.items():
            if not isinstance(pattern, str) or name not in (*SCHEMES, NONE):
                raise ValueError(f"quantization has {pattern!r}: {name!r}: it must be one of {names}, {NONE}")
        return
    raise ValueError(
        f"quantization is {quantization!r}: it must be one of {names}, or patterns of weight names with one each"
    )


def parse_quantization(text: str) -> Quantization:
    """As the command line has it: the name of a scheme, or patterns of weight names, "*.mlp.*=int8,*=none". Raises
    ValueError."""
    if "=" not in text:
        check_quantization(text)
        return text
    patterns: dict[str, str] = {}
    for part in text.split(","):
        pattern, equals, name = (piece.strip() for piece in part.rpartition("="))
        if not equals or not pattern or pattern in patterns:
            raise ValueError(f"quantization is {text!r}: {part!r} must be PATTERN=SCHEME, each pattern once")
        patterns[pattern] = name
    check_quantization(patterns)
    return patterns


def scheme_of(quantization: Quantization | None, weight: str, is_embedding: bool) -> Scheme | None:
    """The scheme of a matrix. A name is for all that are multiplied with, and not for embeddings; of
    patterns (`*.mlp.*`, as in a shell) the first that fits decides, for tables too."""
    if quantization is None or isinstance(quantization, str):
        return None if quantization is None or is_embedding else SCHEMES[quantization]
    return next((SCHEMES.get(n) for pattern, n in quantization.items() if fnmatch.fnmatchcase(weight, pattern)), None)
