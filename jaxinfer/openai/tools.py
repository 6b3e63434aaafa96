"""Calls of tools that must come, as a form of an answer."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from jaxinfer.json_schema import OPTIONS, moved


def calls_schema(tools: list[dict[str, Any]], names: Collection[str], most: int | None) -> dict[str, Any]:
    """The JSON schema of a list of calls, one at least, of tools with these names. most: how many there may be."""
    functions = [tool["function"] for tool in tools if tool["function"]["name"] in names]
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": function["name"]},
                "arguments": moved(
                    function.get("parameters") or {"type": "object"}, f"/items/anyOf/{i}/properties/arguments"
                ),
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for i, function in enumerate(functions)
    ]
    limit = {} if most is None else {"maxItems": most}
    # llguidance looks for its options at the top alone: there are those that all have.
    options = [(function.get("parameters") or {}).get(OPTIONS) for function in functions]
    shared = {OPTIONS: options[0]} if options and all(own == options[0] for own in options) and options[0] else {}
    return {"type": "array", "minItems": 1, "items": {"anyOf": calls}} | limit | shared
