"""The preallocated key/value pages as device pytrees. No policy lives here: who owns which page is `engine/`."""

from jaxinfer.cache.pages import (
    BITS,
    KV_DTYPES,
    SCALE,
    Cache,
    FusedPages,
    LayerCache,
    PackedPages,
    QuantizedPages,
    SplitPages,
    values_dtype,
)

__all__ = [
    "BITS",
    "KV_DTYPES",
    "SCALE",
    "Cache",
    "FusedPages",
    "LayerCache",
    "PackedPages",
    "QuantizedPages",
    "SplitPages",
    "values_dtype",
]
