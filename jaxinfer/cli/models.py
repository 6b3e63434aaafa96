"""`jaxinfer models`."""

from __future__ import annotations

import json

from jaxinfer.cli.options import JSON
from jaxinfer.models.registry import ENCODERS, REGISTRY, TABLES


def models(as_json: JSON = False) -> None:
    """List the architectures that load: those that make text, and encoders and tables, which make vectors.

    The first make vectors, too, where a checkpoint is for it (folders of sentence-transformers), and all but tables
    classes (ForSequenceClassification).
    """
    kinds = {"text": REGISTRY, "vectors": ENCODERS | TABLES}
    rows = [(e.model_type, name, makes, e.known_as) for makes, known in kinds.items() for name, e in known.items()]
    if as_json:
        names = ("model_type", "hf_class", "makes", "known_as")
        print(json.dumps([dict(zip(names, row, strict=True)) for row in rows]))
        return
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(Column("model_type", no_wrap=True), Column("class", no_wrap=True), "makes", "models")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
