"""Flax NNX building blocks that the models share; weights keep Hugging Face's names and `[out, in]` layout."""
