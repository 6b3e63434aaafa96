"""Tools of a chat as JSON schemas, made from Python functions where a function is given.

The form is the one that chat templates expect: {"type": "function", "function": {"name", "description",
"parameters"}}. Types come from the annotations, descriptions from a Google-style docstring.
"""

import enum
import inspect
import json
import re
import types
from collections.abc import Callable, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from jaxinfer.errors import RequestError

__all__ = ["Tool", "function_schema", "tool_schema"]

Tool = Mapping[str, Any] | Callable[..., Any]

_TYPE_NAMES: dict[Any, str] = {
    int: "integer",
    float: "number",
    str: "string",
    bool: "boolean",
    type(None): "null",
    list: "array",
    tuple: "array",
    dict: "object",
}
_SECTION = re.compile(r"^\s*(Args|Returns|Raises):\s*$", re.MULTILINE)
_CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)


def tool_schema(tool: Tool, where: str = "tool") -> Mapping[str, Any]:
    """`tool` itself when it is a schema, else the schema of the function. Raises RequestError for anything else."""
    if isinstance(tool, Mapping):
        return tool
    if inspect.isfunction(tool) or inspect.ismethod(tool):
        return function_schema(tool, where)
    raise RequestError.at(where, f"expected a JSON schema (a dict) or a Python function, found {type(tool).__name__}")


def function_schema(function: Callable[..., Any], where: str = "tool") -> dict[str, Any]:
    """The schema of a function. Raises RequestError when an annotation or a description is missing or unusable."""
    where = f"{where} {getattr(function, '__name__', 'function')}()"
    description, arguments, returns = _docstring(function, where)
    try:
        hints = get_type_hints(function)
    except (NameError, TypeError) as error:
        raise RequestError.at(where, f"annotations can't be read ({error}); pass a JSON schema instead") from None
    properties: dict[str, Any] = {}
    required = []
    for i, (name, parameter) in enumerate(inspect.signature(function).parameters.items()):
        if i == 0 and name in ("self", "cls") and name not in hints:
            continue
        if name not in hints:
            raise RequestError.at(where, f"argument {name} has no type annotation; add one, or pass a JSON schema")
        if name not in arguments:
            raise RequestError.at(where, f"argument {name} is not described under Args: in the docstring; describe it")
        schema, text = _type_schema(hints[name], f"{where} argument {name}"), arguments[name]
        if choices := _CHOICES.search(text):
            try:
                schema["enum"] = json.loads(choices[1])
            except ValueError:
                raise RequestError.at(where, f"argument {name} has choices that are not JSON: {choices[1]!r}") from None
            text = text[: choices.start()].strip()
        properties[name] = {**schema, "description": text}
        if parameter.default is inspect.Parameter.empty:
            required.append(name)
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        parameters["required"] = required
    result: dict[str, Any] = {"name": function.__name__, "description": description, "parameters": parameters}
    if "return" in hints:
        try:
            result["return"] = _type_schema(hints["return"], f"{where} return value")
        except ValueError:
            pass  # the model never writes it, so a type without a schema does no harm
        else:
            if returns:
                result["return"]["description"] = returns
    return {"type": "function", "function": result}


def _type_schema(hint: Any, where: str) -> dict[str, Any]:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return {}
    if origin is None and hint in _TYPE_NAMES:
        return {"type": _TYPE_NAMES[hint]}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _choice([member.value for member in hint], where)
    if origin is Literal:
        return _choice(list(args), where)
    if origin is Union or origin is types.UnionType:
        options = [_type_schema(arg, where) for arg in args if arg is not type(None)]
        if len(options) == 1:
            schema = options[0]
        elif all(option.keys() == {"type"} and isinstance(option["type"], str) for option in options):
            names = sorted({option["type"] for option in options})
            schema = {"type": names[0] if len(names) == 1 else names}
        else:
            schema = {"anyOf": options}
        return {**schema, "nullable": True} if type(None) in args else schema
    if origin is list:
        return {"type": "array", "items": _type_schema(args[0], where)}
    if origin is tuple and len(args) > 1 and ... not in args:
        return {"type": "array", "prefixItems": [_type_schema(arg, where) for arg in args]}
    if origin is dict:
        return {"type": "object", "additionalProperties": _type_schema(args[1], where)}
    raise RequestError.at(where, f"type {hint!r} has no JSON schema; use basic types, or pass a JSON schema")


def _choice(values: list[Any], where: str) -> dict[str, Any]:
    scalars = (int, float, str, bool, type(None))
    if not values or any(type(value) not in scalars for value in values):
        raise RequestError.at(where, f"choices must be JSON scalars, found {values!r:.80}")
    names = list(dict.fromkeys(_TYPE_NAMES[type(value)] for value in values))
    return {"type": names[0] if len(names) == 1 else names, "enum": values}


def _docstring(function: Callable[..., Any], where: str) -> tuple[str, dict[str, str], str]:
    """(what the function does, argument -> description, what it returns) from a Google-style docstring."""
    doc = inspect.getdoc(function)
    if not doc:
        raise RequestError.at(where, "no docstring to describe it to the model; add one, or pass a JSON schema")
    pieces = _SECTION.split(doc)
    sections = dict(zip(pieces[1::2], pieces[2::2], strict=True))
    arguments: dict[str, str] = {}
    name, outer = "", None
    for line in filter(str.strip, sections.get("Args", "").split("\n")):
        indent = len(line) - len(line.lstrip())
        match = re.match(r"\s*(\w+)(?:\s*\([^)]*\))?:\s*(.*)", line)
        if match and (outer is None or indent <= outer):
            outer, name = indent, match[1]
            arguments[name] = match[2].strip()
        elif name:
            arguments[name] = f"{arguments[name]} {line.strip()}".strip()
    return pieces[0].strip(), arguments, sections.get("Returns", "").strip()
