"""What a model may write where tools are strict, text and calls in its own form with arguments of their schemas, and
where one must be called. As a grammar in llguidance's Lark,
<https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md>."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jaxinfer.errors import RequestError
from jaxinfer.json_schema import MAX_BYTES, OPTIONS, SPACES, check_size, written
from jaxinfer.text.scanner import Format, Section, Written

_SPACE = r"/[ \t\r\n]{1,8}/"  # between the parts of a call
_ANYTHING = r"(.|\n)*"
_TEXT = f"/{_ANYTHING}/"
_NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}


def asks_strictness(tools: Collection[Mapping[str, Any]]) -> bool:
    """Whether arguments must be of the schema of one at least, in OpenAI's form."""
    return any(tool["function"].get("strict") is True for tool in tools)


def strict_section(form: Format) -> Section | None:
    """The one in which calls are written, if a grammar for it is known."""
    return next((section for section in form.sections if section.written is not None), None)


def strict_grammar(
    section: Section,
    tools: Collection[Mapping[str, Any]],
    most: int | None,
    special: Collection[str],
    parameters: str = "function.parameters",
) -> str:
    """Text, in which each marker of a call begins one of a tool that there is. most: how many calls. special: tokens
    that a marker may be, as they are written. parameters: what errors call the schema of a tool. Raises RequestError
    for schemas that are too large."""
    assert section.written is not None
    functions = [tool["function"] for tool in tools]
    # A tool without parameters has none of them.
    schemas = [own.get("parameters") or _NOTHING if own.get("strict") is True else None for own in functions]
    calls = _calls(section.written, dict(enumerate(functions)), schemas, parameters)
    opens, closes = section.opens, section.closes[0]
    rules = [f"TEXT: {_TEXT}", f"SPACE: {_SPACE}", "text: TEXT"]
    rules.append(f"begins: TEXT {opens}" if opens in special else f"begins[lazy]: {_TEXT} {_quoted(opens)}")
    rules.append(f"ends: {closes if closes in special else _quoted(closes)}")
    rules += itertools.chain.from_iterable(calls)
    rules.append(f"call: begins SPACE? ({' | '.join(f'tool_{i}' for i in range(len(calls)))}) SPACE? ends")
    # What follows the only call is nothing: in text another one could begin.
    rules.append("start: call* text" if most is None else "start: text | call SPACE?")
    return "\n".join(["%llguidance {}", *rules, ""])


def required_grammar(
    tools: Collection[Mapping[str, Any]],
    names: Collection[str],
    most: int | None,
    parameters: str = "function.parameters",
) -> str:
    """A list of calls in JSON, one at least, of tools with these names; the others are as for `strict_grammar`."""
    functions = {i: tool["function"] for i, tool in enumerate(tools) if tool["function"]["name"] in names}
    calls = _calls(json_call, functions, [own.get("parameters") or None for own in functions.values()], parameters)
    rules = [f"SPACE: /{SPACES}/", *itertools.chain.from_iterable(calls)]
    rules.append(f"call: SPACE? ({' | '.join(f'tool_{i}' for i in functions)}) SPACE?")
    rules.append('start: "[" call ("," call)* "]"' if most is None else 'start: "[" call "]"')
    return "\n".join(["%llguidance {}", *rules, ""])


def _calls(
    write: Written, functions: Mapping[int, Mapping[str, Any]], schemas: list[Any], parameters: str
) -> list[list[str]]:
    """Rules of each function's call, by its number among all tools. Raises RequestError, which says of which it is."""
    for i, schema in zip(functions, schemas, strict=True):
        with _blaming(f"tools[{i}].{parameters}"):
            check_size([schema])
    with _blaming("tools", "all schemas together: "):  # before any of them is written
        check_size(schemas)
    calls = []
    for (i, own), schema in zip(functions.items(), schemas, strict=True):
        with _blaming(f"tools[{i}].{parameters}"):
            calls.append(write(f"tool_{i}", own["name"], schema))
    return calls


@contextmanager
def _blaming(place: str, before: str = "") -> Iterator[None]:
    """Says where in the request it is that a ValueError is of."""
    try:
        yield
    except ValueError as error:
        raise RequestError.at(place, f"{before}{error}") from None


def json_call(rule: str, name: str, parameters: Mapping[str, Any] | None) -> list[str]:
    """{"name": "NAME", "arguments": {...}}, as rules of which the first one has this name. parameters: their schema;
    None: any."""
    parts = ["{", '"name"', ":", json.dumps(name, ensure_ascii=False), ",", '"arguments"', ":"]
    arguments = _json({"type": "object"} if parameters is None else parameters)
    return [f"{rule}: {' SPACE? '.join([*map(_quoted, parts), arguments, _quoted('}')])}"]


def function_call(rule: str, name: str, parameters: Mapping[str, Any] | None) -> list[str]:
    """<function=NAME> <parameter=KEY> value </parameter> </function>: a text is as it is, anything else JSON.
    Raises ValueError."""
    begins, ends = _quoted(f"<function={name}>"), _quoted("</function>")
    if parameters is None:
        return [f"{rule}: {begins} {rule}_any", f"{rule}_any[lazy]: {_TEXT} {ends}"]
    properties, required = parameters.get("properties"), parameters.get("required")
    properties = properties if isinstance(properties, dict) else {}
    required = required if isinstance(required, list) else []
    options = {name: parameters[name] for name in (OPTIONS,) if name in parameters}
    pointed_at = {name: parameters[name] for name in ("$defs", "definitions") if name in parameters}
    own, rules, size = [], [], 0
    for i, (key, schema) in enumerate(properties.items()):
        value, closes = f"{rule}_{i}", _quoted("\n</parameter>")
        begin = _quoted(f"<parameter={key}>\n")
        if _is_text(schema):
            text = _TEXT
            if limited := _limited(schema):
                text = value.upper()
                rules.append(f"{text}: {limited}")
            rules.append(f"{value}_text[lazy]: {text} {closes}")
            rules.append(f"{value}: {begin} {value}_text")
        elif texts := _texts(schema):
            rules.append(f"{value}: {begin} ({' | '.join(map(_quoted, texts))}) {closes}")
        else:
            if isinstance(schema, dict):
                schema = options | (pointed_at if '"$ref"' in json.dumps(schema) else {}) | schema
            rules.append(f"{value}: {begin} {_json(schema)} {closes}")
        size += len(rules[-1])
        if size > MAX_BYTES:
            raise ValueError(f"$defs: as part of each property that has a $ref they have more than {MAX_BYTES} bytes")
        own.append(f"{value} SPACE?" if key in required else f"({value} SPACE?)?")
    return [f"{rule}: {' '.join([begins, 'SPACE?', *own, ends])}", *rules]


def _is_text(schema: Any) -> bool:
    return isinstance(schema, dict) and schema.get("type") == "string" and not {"enum", "const"} & schema.keys()


def _limited(schema: Mapping[str, Any]) -> str | None:
    """A terminal of the texts of a schema's lengths and pattern that don't end the parameter; None: all are. Raises
    ValueError."""
    least, most, pattern = (schema.get(name) for name in ("minLength", "maxLength", "pattern"))
    if least is most is pattern is None:
        return None
    for name, value in (("minLength", least), ("maxLength", most)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise ValueError(f"{name} is {value!r:.40}: it must be an integer of at least 0")
    if most is not None and (least or 0) > most:
        raise ValueError(f"minLength is {least}, and maxLength is {most}: no text matches")
    terminals = [r"~/(.|\n)*<\/parameter>(.|\n)*/", f"/(.|\\n){{{least or 0},{'' if most is None else most}}}/"]
    return " & ".join(terminals if pattern is None else [*terminals, f"/{_anywhere(pattern)}/"])


def _anywhere(pattern: Any) -> str:
    """Texts in which there is something that matches a regular expression; one whole text if that has anchors. Raises
    ValueError."""
    if not isinstance(pattern, str):
        raise ValueError(f"pattern is {pattern!r:.40}: it must be a text")
    depth, alternatives = 0, False
    for part in re.findall(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|.", pattern, re.DOTALL):
        depth += (part == "(") - (part == ")")
        alternatives |= part == "|" and not depth
        if depth < 0:
            raise ValueError(f"pattern is {pattern!r:.100}: it closes a group that it does not open")
    begins, ends = pattern.startswith("^"), re.search(r"(?<!\\)(?:\\\\)*\$$", pattern) is not None
    if alternatives and (begins or ends):
        raise ValueError(f"pattern is {pattern!r:.100}: put its alternatives, without ^ and $, into a group")
    inner = pattern[begins : len(pattern) - ends].replace("\n", r"\n")
    inner = re.sub(r"(\\.)|/", lambda found: found[1] or r"\/", inner)  # as Lark writes it
    return f"{'' if begins else _ANYTHING}(?:{inner}){'' if ends else _ANYTHING}"


def _texts(schema: Any) -> list[str]:
    """Those that a value may be, if it may be nothing else."""
    if not isinstance(schema, dict):
        return []
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    return values if isinstance(values, list) and all(isinstance(value, str) for value in values) else []


def _json(schema: Any) -> str:
    return f"%json {written(schema)}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
