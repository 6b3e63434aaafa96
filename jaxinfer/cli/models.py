"""`jaxinfer models`."""

from __future__ import annotations

import json

from jaxinfer.cli.options import JSON
from jaxinfer.models.registry import REGISTRY


def models(as_json: JSON = False) -> None:
    """List the architectures that load."""
    if as_json:
        rows = [{"model_type": name, **entry._asdict()} for name, entry in REGISTRY.items()]
        print(json.dumps([{key: row[key] for key in ("model_type", "hf_class", "known_as")} for row in rows]))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("model_type", "class", "models")
    for name, entry in REGISTRY.items():
        table.add_row(name, entry.hf_class, entry.known_as)
    Console().print(table)
