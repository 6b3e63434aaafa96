"""What can be seen of a grammar in Lark before llguidance takes too long, or too much memory, to understand it."""

from __future__ import annotations

import json
import re

from jaxinfer.json_schema import check_references, check_size

MOST_SQUARED = 2**26  # of the parts of all terminals, half a second
_DEFINITION = re.compile(r"^[ \t]*(?:(_?[A-Z][A-Z0-9_]*)|[?!]?_?[a-z]\w*)[^\n:\"/]*:", re.MULTILINE)
# Comments and strings; regular expressions; repetitions; names of terminals.
_LEXEMES = re.compile(r'//[^\n]*|"(?:\\.|[^"\\])*"|(/(?:\\.|[^/\\])+/)|([*+?{~])|(_?[A-Z][A-Z0-9_]*)')


def check_lark(grammar: str) -> None:
    """Raises ValueError for terminals of too many parts, each written out where another one names it, and for JSON
    schemas that `check_size` or `check_references` refuses."""
    schemas = _schemas(grammar)
    check_size(schemas)
    for schema in schemas:
        check_references(schema)
    definitions = list(_DEFINITION.finditer(grammar))
    ends = [after.start() for after in definitions[1:]] + [len(grammar)]
    own: dict[str, int] = {}  # repetitions: others take no longer than their text is long
    named: dict[str, list[str]] = {}
    for definition, end in zip(definitions, ends, strict=True):
        if definition[1] is None:
            continue
        own[definition[1]], named[definition[1]] = 0, []
        for pattern, repeated, name in _LEXEMES.findall(grammar, definition.end(), end):
            own[definition[1]] += bool(repeated) + sum(map(pattern.count, "*+?{"))
            named[definition[1]] += [name] if name else []
    if sum(size**2 for size in _sizes(own, named).values()) > MOST_SQUARED:
        raise ValueError(f"terminals: the squares of the numbers of parts of all may come to {MOST_SQUARED}")


def _schemas(grammar: str) -> list[object]:
    """Those that are embedded in it, as far as they are JSON."""
    found = []
    for sign in re.finditer(r"%json\s*", grammar):
        try:
            found.append(json.JSONDecoder().raw_decode(grammar, sign.end())[0])
        except (ValueError, RecursionError):
            continue  # llguidance says what is wrong
    return found


def _sizes(own: dict[str, int], named: dict[str, list[str]]) -> dict[str, int]:
    """Of each terminal with those that it names. One that names itself, which llguidance refuses, counts once."""
    sizes: dict[str, int] = {}
    for first in own:
        pending = [first]
        while pending:
            name = pending[-1]
            if name not in sizes:
                sizes[name] = 1  # while it is being counted
                pending += [inner for inner in named[name] if inner in own and inner not in sizes]
            else:
                pending.pop()
                sizes[name] = max(1, own[name] + sum(sizes.get(inner, 1) for inner in named[name]))
    return sizes
