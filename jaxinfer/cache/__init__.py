"""What layers keep of sequences: pages and slots as device pytrees, declared by specs, in groups. No policy lives here:
who owns which page is `engine/`."""

from jaxinfer.cache.groups import CacheGroup, Pool, group_layers
from jaxinfer.cache.pages import (
    BITS,
    KV_DTYPES,
    SCALE,
    Cache,
    FusedPages,
    HeadMajorPages,
    InterleavedPages,
    LayerCache,
    QuantizedPages,
    values_dtype,
)
from jaxinfer.cache.spec import (
    ChunkedSpec,
    FullAttentionSpec,
    KVCacheSpec,
    LatentSpec,
    RecurrentSpec,
    SharedSpec,
    SlidingWindowSpec,
    attention_spec,
    gather_latents,
    read_state,
    write_latents,
    write_state,
)

__all__ = [
    "BITS",
    "KV_DTYPES",
    "SCALE",
    "Cache",
    "CacheGroup",
    "ChunkedSpec",
    "FullAttentionSpec",
    "FusedPages",
    "HeadMajorPages",
    "InterleavedPages",
    "KVCacheSpec",
    "LatentSpec",
    "LayerCache",
    "Pool",
    "QuantizedPages",
    "RecurrentSpec",
    "SharedSpec",
    "SlidingWindowSpec",
    "attention_spec",
    "gather_latents",
    "group_layers",
    "read_state",
    "values_dtype",
    "write_latents",
    "write_state",
]
