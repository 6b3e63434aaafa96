"""Calls of tools as models write them: one function for each way, from what stands between a format's markers.

Each returns the calls, or None for what is none. Arguments stay as the model wrote them, where it wrote JSON.
"""

from __future__ import annotations

import ast
import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Call", "Parse", "Schemas"]

# Of each tool by name: the properties of its parameters.
Schemas = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Call:
    """A call of a tool.

    arguments: a JSON object as text.
    id: the model's own, or one that was made for it; "" until then.
    """

    name: str
    arguments: str
    id: str = ""


Parse = Callable[[str, Schemas], list[Call] | None]


def schemas(tools: list[dict[str, Any]]) -> Schemas:
    """Of tools in OpenAI's form."""
    functions = [tool["function"] for tool in tools]
    return {function["name"]: _properties(function.get("parameters")) for function in functions}


def _properties(parameters: Any) -> Mapping[str, Any]:
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    return properties if isinstance(properties, dict) else {}


def json_calls(body: str, _: Schemas) -> list[Call] | None:
    """{"name": ..., "arguments": {...}}, a list of them, or several one after the other."""
    calls: list[Call] = []
    try:
        for value in _values(body):
            entries = list(_values(value[1:-1])) if value.startswith("[") else [value]
            calls += [_json_call(entry) for entry in entries]
    except (ValueError, RecursionError):
        return None
    return calls or None


def begun_calls(body: str, _: Schemas) -> list[Call]:
    """Those that are whole of a list of calls in JSON, which may break off."""
    calls: list[Call] = []
    with contextlib.suppress(ValueError, RecursionError):
        for value in _values(body.lstrip().removeprefix("[")):
            calls.append(_json_call(value))
    return calls


def _json_call(text: str) -> Call:
    fields = _members(text)
    name = json.loads(fields["name"]) if "name" in fields else None
    if isinstance(name, dict):
        raise ValueError("a name is text")
    if name is None and "function" in fields:
        return _json_call(fields["function"])
    arguments = fields.get("arguments") or fields.get("parameters") or "{}"
    if not isinstance(name, str) or not name:
        raise ValueError("a call has a name")
    return Call(name, _object(arguments))


def _object(text: str) -> str:
    """Arguments, which some models write as an object in text."""
    if text.startswith('"'):
        text = json.loads(text).strip()
        _check(text)
    if text == "null":
        return "{}"
    if not text.startswith("{"):
        raise ValueError("arguments are an object")
    return text


def _check(text: str) -> None:
    if _end(text, 0) != len(text):
        raise ValueError("more than one value")


def _strict(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_strict)
_SPACE = re.compile(r"\s*")


def _end(text: str, at: int) -> int:
    """Where the JSON value that begins there ends. Raises ValueError."""
    return _DECODER.raw_decode(text, at)[1]


def _values(text: str) -> Iterator[str]:
    """The JSON values of a text, as they are written, with white space, commas or semicolons between them."""
    at = _skip(text, 0, ",;")
    while at < len(text):
        end = _end(text, at)
        yield text[at:end]
        at = _skip(text, end, ",;")


def _skip(text: str, at: int, more: str = "") -> int:
    while at < len(text) and (text[at].isspace() or text[at] in more):
        at += 1
    return at


def _members(text: str) -> dict[str, str]:
    """The members of a JSON object, values as they are written. Raises ValueError."""
    if not text.startswith("{"):
        raise ValueError("no object")
    members = {}
    at = _skip(text, 1, ",")
    while text[at : at + 1] not in ("}", ""):
        key, at = _DECODER.raw_decode(text, at)
        at = _skip(text, _skip(text, at), ":")
        end = _end(text, at)
        members[str(key)] = text[at:end]
        at = _skip(text, end, ",")
    return members


def in_string(body: str) -> bool:
    """Whether JSON ends inside of a string."""
    return re.sub(r"\\.", "", body, flags=re.DOTALL).count('"') % 2 == 1


_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*?)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>(.*?)</parameter>\s*", re.DOTALL)
_INVOKE = re.compile(r'\s*<invoke name="([^"\n]+)">(.*?)</invoke>\s*', re.DOTALL)
_NAMED = re.compile(r'\s*<parameter name="([^"\n]+)">(.*?)</parameter>\s*', re.DOTALL)


def function_calls(body: str, tools: Schemas) -> list[Call] | None:
    """<function=NAME> <parameter=KEY> value </parameter> </function>"""
    return _tagged(body, tools, _FUNCTION, _PARAMETER)


def invoke_calls(body: str, tools: Schemas) -> list[Call] | None:
    """<invoke name="NAME"> <parameter name="KEY">value</parameter> </invoke>"""
    return _tagged(body, tools, _INVOKE, _NAMED)


def _tagged(body: str, tools: Schemas, call: re.Pattern[str], parameter: re.Pattern[str]) -> list[Call] | None:
    calls = []
    for name, inner in _all(call, body) or []:
        pairs = _all(parameter, inner)
        if pairs is None:
            return None
        calls.append(_typed(name.strip(), pairs, tools))
    return calls or None


def _all(pattern: re.Pattern[str], text: str) -> list[tuple[str, str]] | None:
    """The groups of all matches, if there is nothing else."""
    groups, at = [], 0
    while at < len(text) and (match := pattern.match(text, at)):
        groups.append((match[1], match[2]))
        at = match.end()
    return groups if not text[at:].strip() else None


_ARGUMENT = re.compile(r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>\s*", re.DOTALL)


def key_value_calls(body: str, tools: Schemas) -> list[Call] | None:
    """NAME <arg_key>key</arg_key> <arg_value>value</arg_value>"""
    name, tag, rest = body.partition("<arg_key>")
    pairs = _all(_ARGUMENT, tag + rest)
    name = name.strip()
    if not name or pairs is None or not re.fullmatch(r"[\w.\-]+", name):
        return None
    return [_typed(name, pairs, tools)]


def _typed(name: str, pairs: list[tuple[str, str]], tools: Schemas) -> Call:
    """Values that are written without a type get the one of the tool's schema."""
    properties = tools.get(name, {})
    values = {key.strip(): _value(value, properties.get(key.strip())) for key, value in pairs}
    return Call(name, json.dumps(values, ensure_ascii=False))


def _value(text: str, schema: Any) -> Any:
    text = text.removeprefix("\n").removesuffix("\n")
    kind = schema.get("type") if isinstance(schema, dict) else "string"
    if kind == "string":
        return text
    try:
        value = json.loads(text.strip(), parse_constant=_strict)
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        lowered = text.strip().lower()
        return lowered == "true" if kind == "boolean" and lowered in ("true", "false") else text
    return value


_DEEPSEEK = re.compile(r"\s*<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?([^<\n]+)(?:<｜tool▁sep｜>|\n```json\n)")
_KIMI = re.compile(r"\s*<\|tool_call_begin\|>\s*(?:functions\.)?([\w.\-]+?):(\d+)\s*<\|tool_call_argument_begin\|>")
_MISTRAL = re.compile(r"\s*(?:\[TOOL_CALLS\])?([\w.\-]+)(?:\[CALL_ID\]([\w\-]+))?\[ARGS\]")


def deepseek_calls(body: str, _: Schemas) -> list[Call] | None:
    """<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{...}<｜tool▁call▁end｜>, or, in V3 and R1, with "function" before the
    name and fences around the arguments."""
    found = _headed(body, _DEEPSEEK, re.compile(r"\s*(?:```)?\s*(?:<｜tool▁call▁end｜>)?"))
    return [Call(match[1].strip(), arguments) for match, arguments in found] or None


def kimi_calls(body: str, _: Schemas) -> list[Call] | None:
    """<|tool_call_begin|>functions.NAME:IDX<|tool_call_argument_begin|>{...}<|tool_call_end|>"""
    found = _headed(body, _KIMI, re.compile(r"\s*(?:<\|tool_call_end\|>)?"))
    return [Call(match[1], arguments, f"functions.{match[1]}:{match[2]}") for match, arguments in found] or None


def mistral_calls(body: str, tools: Schemas) -> list[Call] | None:
    """[{"name": ..., "arguments": {...}}], or NAME[ARGS]{...}"""
    if body.lstrip().startswith("["):
        return json_calls(body, tools)
    found = _headed(body, _MISTRAL, _SPACE)
    return [Call(match[1], arguments, match[2] or "") for match, arguments in found] or None


def _headed(body: str, header: re.Pattern[str], footer: re.Pattern[str]) -> list[tuple[re.Match[str], str]]:
    """Headers, each with the JSON object after it; none if there is anything else."""
    calls: list[tuple[re.Match[str], str]] = []
    at = 0
    try:
        while body[at:].strip():
            match = header.match(body, at)
            if match is None:
                return []
            start = _skip(body, match.end())
            end = _end(body, start)
            calls.append((match, _object(body[start:end])))
            ending = footer.match(body, end)
            assert ending is not None  # it may be empty
            at = ending.end()
    except (ValueError, RecursionError):
        return []
    return calls


_HARMONY = re.compile(
    r"(?:functions\.)?([\w.\-]+)(?:<\|channel\|>commentary)?\s*(?:<\|constrain\|>)?\s*(?:json)?\s*<\|message\|>"
)


def harmony_calls(body: str, _: Schemas) -> list[Call] | None:
    """functions.NAME <|constrain|>json<|message|>{...}"""
    found = _headed(body, _HARMONY, _SPACE)
    return [Call(match[1], arguments) for match, arguments in found] or None


def python_calls(body: str, _: Schemas) -> list[Call] | None:
    """[name(key=value, ...), ...]"""
    try:
        tree = ast.parse(body.strip(), mode="eval").body
        if not isinstance(tree, ast.List) or not tree.elts:
            return None
        return [_python_call(node) for node in tree.elts]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _python_call(node: ast.expr) -> Call:
    if not isinstance(node, ast.Call) or node.args or any(keyword.arg is None for keyword in node.keywords):
        raise ValueError("no call with named arguments")
    arguments = {keyword.arg: _literal(keyword.value) for keyword in node.keywords}
    return Call(ast.unparse(node.func), json.dumps(arguments, ensure_ascii=False, allow_nan=False))


_NAMES = {"true": True, "false": False, "null": None, "none": None}


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id in _NAMES:
        return _NAMES[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        keys = [_literal(key) if key is not None else None for key in node.keys]
        return {str(key): _literal(value) for key, value in zip(keys, node.values, strict=True)}
    value = ast.literal_eval(node)
    if not isinstance(value, str | int | float | bool | None):
        raise ValueError("no JSON")
    return value
