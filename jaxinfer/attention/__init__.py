"""Attention over a flat stream of tokens: writes new keys and values into the pages, then attends.

`attend` is the one function that models call. Plain XLA is the oracle for every other backend.
"""

from jaxinfer.attention.attend import attend
from jaxinfer.attention.backend import AttentionBackend, AttentionCase
from jaxinfer.attention.backends import BACKENDS, reasons
from jaxinfer.attention.batch import ForwardBatch, LayerMap, Table
from jaxinfer.attention.layout import CacheLayout, LayerLayout
from jaxinfer.attention.relative import Relative
from jaxinfer.attention.spec import AttentionSpec

__all__ = [
    "BACKENDS",
    "AttentionBackend",
    "AttentionCase",
    "AttentionSpec",
    "CacheLayout",
    "ForwardBatch",
    "LayerLayout",
    "LayerMap",
    "Relative",
    "Table",
    "attend",
    "reasons",
]
