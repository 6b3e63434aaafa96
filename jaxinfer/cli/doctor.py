"""`jaxinfer doctor`."""

from __future__ import annotations

import json

from jaxinfer.cli.options import JSON


def doctor(as_json: JSON = False) -> None:
    """Say what is here: devices, kernels and why they are used or not, versions, the compilation cache, memory."""
    from jaxinfer.doctor import examine

    found = examine()
    if as_json:
        print(json.dumps(found))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in found.items():
        table.add_row(name, "\n".join(value) if isinstance(value, list) else str(value))
    Console().print(table, markup=False, highlight=False)
