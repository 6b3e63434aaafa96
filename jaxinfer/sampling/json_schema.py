"""JSON schemas that say the same in other words, or more."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

NAMED = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}  # schemas by names
DATA = {"const", "enum", "default", "example", "examples"}  # no schemas, whatever they look like
# Of JSON Schema, draft 2020-12, section 7.3 of its validation vocabulary. There all others are mere annotations.
FORMATS = {
    *("date-time", "date", "time", "duration", "email", "idn-email", "hostname", "idn-hostname", "ipv4", "ipv6", "uri"),
    *(
        "uri-reference",
        "iri",
        "iri-reference",
        "uuid",
        "uri-template",
        "json-pointer",
        "relative-json-pointer",
        "regex",
    ),
}


def closed(schema: Any) -> Any:
    """With objects that name properties, and say nothing of additional ones, having none of these."""

    def close(part: dict[str, Any]) -> dict[str, Any]:
        names_some = "properties" in part or "patternProperties" in part
        return {**part, "additionalProperties": False} if names_some and "additionalProperties" not in part else part

    return _changed(schema, close, but=["allOf"])  # what its parts don't name, others may


def of_known_formats(schema: Any) -> Any:
    """Without formats that JSON Schema doesn't define: "password" of OpenAPI and "path" of pydantic are of strings that
    may have any form."""

    def know(part: dict[str, Any]) -> dict[str, Any]:
        unknown = isinstance(part.get("format"), str) and part["format"] not in FORMATS
        return {key: value for key, value in part.items() if key != "format"} if unknown else part

    return _changed(schema, know)


def _changed(schema: Any, change: Callable[[dict[str, Any]], dict[str, Any]], but: Collection[str] = ()) -> Any:
    """With each schema in it changed, and it itself, `but` for what stands under these keywords."""
    if isinstance(schema, list):
        return [_changed(item, change, but) for item in schema]
    if not isinstance(schema, dict):
        return schema
    parts = {
        key: {name: _changed(item, change, but) for name, item in value.items()}
        if key in NAMED and isinstance(value, dict)
        else value
        if key in DATA or key in but
        else _changed(value, change, but)
        for key, value in schema.items()
    }
    return change(parts)
