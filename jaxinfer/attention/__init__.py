"""Attention over a flat stream of tokens: writes new keys and values into the pages, then attends.

`attend` is the one function that models call. The XLA implementation is the oracle for every other one.
"""

from jaxinfer.attention.attend import attend, attention_in_words
from jaxinfer.attention.batch import Batch
from jaxinfer.attention.spec import AttentionSpec

__all__ = ["AttentionSpec", "Batch", "attend", "attention_in_words"]
