"""JSON schemas that say the same in other words, or more."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from typing import Any

Part = dict[str, Any]  # an object of a schema that is a schema itself
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
WORDS = {"type", "title", "description"}  # of a name's schema, beside the one that counts


def closed(schema: Any) -> Any:
    """With objects that name properties, and say nothing of additional ones, having none of these."""

    def close(part: Part) -> Part:
        names_some = "properties" in part or "patternProperties" in part
        return {**part, "additionalProperties": False} if names_some and "additionalProperties" not in part else part

    return _changed(schema, close, but=["allOf"])  # what its parts don't name, others may


def in_fewer_words(schema: Any) -> Any:
    """The same without what llguidance does not know and other words say.

    Formats that JSON Schema doesn't define, OpenAPI's "password" and pydantic's "path", say nothing. `propertyNames`
    that are of an enum or a pattern are properties of these names, and no others.
    """
    # A pointer begins at the next `$id` above it: where inner parts have one, nothing is looked up.
    whole = schema if json.dumps(schema).count('"$id":') == ("$id" in schema) else None

    def say(part: Part) -> Part:
        if isinstance(part.get("format"), str) and part["format"] not in FORMATS:
            part = _without(part, "format")
        if "propertyNames" in part and part.keys().isdisjoint({"properties", "patternProperties"}):
            names = _names(part["propertyNames"], whole)
            if names is not None:
                keyword, said = names
                values = part.get("additionalProperties", True)
                named = {keyword: dict.fromkeys(said, values), "additionalProperties": False}
                part = {**_without(part, "propertyNames"), **named}
        return part

    return _changed(schema, say)


def moved(schema: Any, pointer: str) -> Any:
    """The same as a part of another one, to which this pointer leads there: what it points to moves along."""

    def point(part: Part) -> Part:
        there = part.get("$ref")
        if not isinstance(there, str) or not (there == "#" or there.startswith("#/")):
            return part
        return {**part, "$ref": f"#{pointer}{there[1:]}"}

    return schema if isinstance(schema, dict) and "$id" in schema else _changed(schema, point)


def _names(names: Any, schema: Any) -> tuple[str, list[str]] | None:
    """A keyword for properties, and what stands there for these names; None where there is none."""
    if isinstance(names, dict) and names.keys() == {"$ref"}:
        names = _at(schema, names["$ref"])
    if not isinstance(names, dict) or names.get("type", "string") != "string":
        return None
    match sorted(names.keys() - WORDS):
        case ["enum"] if isinstance(names["enum"], list):
            return "properties", [name for name in names["enum"] if isinstance(name, str)]
        case ["const"] if isinstance(names["const"], str):
            return "properties", [names["const"]]
        case ["pattern"] if isinstance(names["pattern"], str):
            return "patternProperties", [names["pattern"]]
    return None


def _at(schema: Any, pointer: Any) -> Any:
    """What a JSON pointer of a `$ref`, without escapes, points to in the schema; None where nothing is."""
    if not isinstance(pointer, str) or not pointer.startswith("#/"):
        return None
    for name in pointer.split("/")[1:]:
        schema = schema.get(name) if isinstance(schema, dict) else None
    return schema


def _without(part: Part, keyword: str) -> Part:
    return {key: value for key, value in part.items() if key != keyword}


def _changed(schema: Any, change: Callable[[Part], Part], but: Collection[str] = ()) -> Any:
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
