"""`jaxinfer models`."""

from __future__ import annotations

import json

from jaxinfer.cli.options import JSON
from jaxinfer.models.registry import REGISTRY


def models(as_json: JSON = False) -> None:
    """List the architectures that load."""
    if as_json:
        rows = [(entry.model_type, name, entry.known_as) for name, entry in REGISTRY.items()]
        print(json.dumps([dict(zip(("model_type", "hf_class", "known_as"), row, strict=True)) for row in rows]))
        return
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(Column("model_type", no_wrap=True), Column("class", no_wrap=True), "models")
    for name, entry in REGISTRY.items():
        table.add_row(entry.model_type, name, entry.known_as)
    Console().print(table)
