"""The preallocated key/value pages as device pytrees. No policy lives here: who owns which page is `engine/`."""

from jaxinfer.cache.pages import Cache, LayerCache, cache_bytes_per_token, cache_shapes

__all__ = ["Cache", "LayerCache", "cache_bytes_per_token", "cache_shapes"]
