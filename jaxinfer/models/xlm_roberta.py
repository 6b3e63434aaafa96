"""XLM-RoBERTa (Conneau et al., arXiv:1911.02116), and CamemBERT (Martin et al., arXiv:1911.03894): RoBERTa's shape."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from jaxinfer.models.roberta import ARCHITECTURE as ROBERTA
from jaxinfer.models.roberta import parse

ARCHITECTURE = replace(ROBERTA, parse=partial(parse, vocab_size=30522))
