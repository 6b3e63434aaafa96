"""The preallocated key/value pages as device pytrees. No policy lives here: who owns which page is `engine/`."""

from jaxinfer.cache.pages import Cache, CacheLayout, GpuPages, LayerCache, PackedPages, SplitPages

__all__ = ["Cache", "CacheLayout", "GpuPages", "LayerCache", "PackedPages", "SplitPages"]
