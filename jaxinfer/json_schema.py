"""JSON schemas as llguidance gets them: in words that it knows, with bounded whitespace, and not so large that it takes
long to understand them; others that say more."""

from __future__ import annotations

import functools
import json
import time
import urllib.parse
from collections.abc import Callable, Collection, Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
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
OPTIONS = "x-guidance"  # the keyword for llguidance's own options, at the top of a schema
# Between the parts of JSON, besides nothing: no text ends in an endless row of them.
SPACES = r" |\r?\n[ \t]{0,32}"
MAX_BYTES = 2**18  # of a schema
PIECE = 512  # things that are looked at while no other thread can
# The time that these take goes with the squares of their numbers, half a second for so many:
MOST_OPTIONAL = 400  # properties, of which llguidance looks at all of an object's at once, at most 2,000 things in all
MOST_OPTIONAL_SQUARED = 10**6  # of all objects
MOST_REQUIRED = 4000  # properties of an object
MOST_PATTERN_SQUARED = 2**26  # characters of all patterns


def written(schema: Any, options: Mapping[str, Any] | None = None) -> str:
    """A schema as JSON, for what llguidance calls a JSON schema or `%json`. options: of llguidance's, which go before
    those that the schema has itself. What is no schema stays as it is: llguidance says what is wrong with it. Raises
    ValueError, naming the keyword, for what llguidance would not see before a text is there."""
    if schema is True:
        schema = {}
    text = json.dumps(schema)
    if '"$ref"' in text:
        check_references(schema)
    if any(f'"{word}"' in text for word in ("format", "propertyNames", "uniqueItems")):
        schema = in_fewer_words(schema)
    if isinstance(schema, dict):
        own = schema.get(OPTIONS, {})
        if not isinstance(own, dict):
            raise ValueError(f"{OPTIONS}: it must be an object")
        chosen = {**own, **(options or {})}
        if chosen.get("whitespace_flexible", True):
            chosen.setdefault("whitespace_pattern", SPACES)
        schema = {**schema, OPTIONS: chosen}
    return json.dumps(schema, ensure_ascii=False)


def check_size(schemas: Iterable[Any]) -> None:
    """Raises ValueError, naming the keyword, for schemas of one grammar that take too long to understand, all together.
    It looks at no more of them than it must."""
    seen = size = optional = patterns = 0  # the last two: squares
    pending = list(schemas)
    while pending:
        item = pending.pop()
        seen += 1
        if not seen % PIECE:
            time.sleep(0)  # or the engine's thread would wait for 5 ms
        size += len(item) + 2 if isinstance(item, str | list | dict) else 1
        if size > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES} bytes, the most that are supported")
        if isinstance(item, list):
            pending += item
        if not isinstance(item, dict):
            continue
        properties, required, by_pattern = (item.get(name) for name in ("properties", "required", "patternProperties"))
        required = required if isinstance(required, list) else []
        if len(required) > MOST_REQUIRED:
            raise ValueError(f"required: an object may have at most {MOST_REQUIRED} properties that are required")
        if isinstance(properties, dict):
            count = len(properties) - len(required)  # of many it is enough
            if count <= MOST_OPTIONAL:
                count = len(properties.keys() - set(map(str, required)))
            optional += count**2
            if count > MOST_OPTIONAL or optional > MOST_OPTIONAL_SQUARED:
                raise ValueError(
                    f"properties: an object may have at most {MOST_OPTIONAL} that are not required, and the squares of "
                    f"their numbers may come to {MOST_OPTIONAL_SQUARED}"
                )
        own = [item.get("pattern"), *(by_pattern if isinstance(by_pattern, dict) else ())]
        patterns += sum(len(pattern) ** 2 for pattern in own if isinstance(pattern, str))
        if patterns > MOST_PATTERN_SQUARED:
            raise ValueError(f"pattern: the squares of the lengths of all may come to {MOST_PATTERN_SQUARED}")
        pending += item
        pending += item.values()


def check_references(schema: Any) -> None:
    """Raises ValueError for a `$ref` that leads back to itself by nothing but others: no text matches it."""
    leads: dict[int, list[int]] = {}  # from a part to those that each of its texts matches too
    pointers: dict[int, str] = {}  # of a part, its `$ref`
    pending = [(schema, schema)]
    while pending:
        part, base = pending.pop()
        if isinstance(part, list):
            pending += [(item, base) for item in part]
        if not isinstance(part, dict):
            continue
        base = part if "$id" in part else base  # in which its pointers are looked up
        there = part.get("$ref")
        target = _at(base, there)
        if isinstance(target, dict):
            leads[id(part)], pointers[id(part)] = [id(target)], str(there)
        for keyword in ("allOf", "anyOf", "oneOf"):
            members = part.get(keyword)
            if isinstance(members, list) and (keyword == "allOf" or len(members) == 1):
                leads.setdefault(id(part), []).extend(map(id, members))
        for keyword, value in part.items():
            if keyword in NAMED and isinstance(value, dict):
                pending += [(item, base) for item in value.values()]
            elif keyword not in DATA:
                pending.append((value, base))
    try:
        TopologicalSorter(leads).prepare()
    except CycleError as error:
        path = [pointers[part] for part in reversed(error.args[1][1:]) if part in pointers]
        shown = " -> ".join([*path[:4], *(["..."] if len(path) > 4 else []), path[0]])
        raise ValueError(
            f"$ref: {shown} is a cycle, which no text matches: give one of them something else than a $ref"
        ) from None


def closed(schema: Any) -> Any:
    """With objects that name properties, and say nothing of additional ones, having none of these."""

    def close(part: Part) -> Part:
        names_some = "properties" in part or "patternProperties" in part
        return {**part, "additionalProperties": False} if names_some and "additionalProperties" not in part else part

    return _changed(schema, close, but=["allOf"])  # what its parts don't name, others may


def in_fewer_words(schema: Any) -> Any:
    """The same without what llguidance does not know and other words say.

    Formats that JSON Schema doesn't define, OpenAPI's "password" and pydantic's "path", say nothing. `propertyNames`
    that are of an enum or a pattern are properties of these names, and no others. Raises ValueError where that is too
    much.
    """
    more = 0  # characters

    @functools.cache
    def whole() -> Any:
        """In which pointers are looked up; they begin at the next `$id` above: where inner parts have one, none is."""
        return schema if json.dumps(schema).count('"$id":') == ("$id" in schema) else None

    def say(part: Part) -> Part:
        nonlocal more
        if isinstance(part.get("format"), str) and part["format"] not in FORMATS:
            part = _without(part, "format")
        for name, everything in (("uniqueItems", False), ("propertyNames", True)):
            if part.get(name) is everything:
                part = _without(part, name)
        if "propertyNames" in part and part.keys().isdisjoint({"properties", "patternProperties"}):
            names = _names(part["propertyNames"], whole)
            if names is not None:
                keyword, said = names
                values = part.get("additionalProperties", True)
                more += sum(map(len, said)) + len(said) * len(json.dumps(values))
                if more > MAX_BYTES:  # each name has its own copy
                    raise ValueError(f"propertyNames: written as properties they have more than {MAX_BYTES} bytes")
                named = {keyword: dict.fromkeys(said, values), "additionalProperties": False}
                part = {**_without(part, "propertyNames"), **named}
        return part

    plain = _changed(schema, say)
    if more:
        check_size([plain])
    return plain


def _names(names: Any, whole: Callable[[], Any]) -> tuple[str, list[str]] | None:
    """A keyword for properties, and what stands there for these names; None where there is none."""
    if isinstance(names, dict) and names.keys() == {"$ref"}:
        names = _at(whole(), names["$ref"])
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
    """What a JSON pointer of a `$ref` points to in the schema; None where nothing is."""
    if not isinstance(pointer, str) or not (pointer == "#" or pointer.startswith("#/")):
        return None
    for name in urllib.parse.unquote(pointer).split("/")[1:]:
        name = name.replace("~1", "/").replace("~0", "~")
        if isinstance(schema, list):
            schema = schema[int(name)] if name.isdecimal() and len(name) < 9 and int(name) < len(schema) else None
        else:
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
