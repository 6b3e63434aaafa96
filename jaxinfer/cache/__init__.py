"""The preallocated key/value pages as device pytrees. No policy lives here: who owns which page is `engine/`."""

from jaxinfer.cache.pages import (
    Cache,
    CacheLayout,
    FusedPages,
    GpuPages,
    LayerCache,
    PackedPages,
    QuantizedPages,
    SplitPages,
    kernel_problem,
    tokamax_version,
    values_dtype,
)

__all__ = [
    "Cache",
    "CacheLayout",
    "FusedPages",
    "GpuPages",
    "LayerCache",
    "PackedPages",
    "QuantizedPages",
    "SplitPages",
    "kernel_problem",
    "tokamax_version",
    "values_dtype",
]
