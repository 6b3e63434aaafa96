"""What bodies may look like, as JSON schemas: what their readers ask of examples, so that no field is listed twice."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from jaxinfer.errors import RequestError
from jaxinfer.openai.answers import Json
from jaxinfer.openai.fields import SAMPLING, Fields
from jaxinfer.sampling.params import SamplingParams
from jaxinfer.sampling.structured import StructuredOutputsParams
from jaxinfer.tasks.params import PoolingParams

TYPES = {int: "integer", float: "number", bool: "boolean", str: "string"}


def of_hint(hint: Any) -> Json:
    """What a value of a Python type is in JSON."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint in TYPES:
        return {"type": TYPES[hint]}
    if origin in (Union, UnionType):
        choices = [of_hint(choice) for choice in inner if choice not in (NoneType, type)]
        return {"anyOf": choices} if len(choices) > 1 else choices[0]
    if origin is tuple:
        return {"type": "array", "prefixItems": [of_hint(item) for item in inner], "minItems": len(inner)}
    if isinstance(origin, type) and issubclass(origin, Iterable) and not issubclass(origin, Mapping):
        return {"type": "array", "items": of_hint(inner[0])}
    if dataclasses.is_dataclass(hint):
        return {"type": "object", "properties": of_hints(hint), "additionalProperties": False}
    return {"type": "object"}


def of_hints(params: Any) -> dict[str, Json]:
    """Of each field of a dataclass."""
    return {name: of_hint(hint) for name, hint in get_type_hints(params).items()}


OBJECTS = {"type": "array", "items": {"type": "object"}}
TEXT_OR_OBJECTS = {"anyOf": [{"type": "string"}, OBJECTS]}
PROMPTS = of_hint(str | list[int] | list[str | list[int]])
# Of fields that are checked elsewhere. One name means one thing, wherever it is `Fields.take` that takes it.
CHECKED: dict[str, Json] = {
    **of_hints(PoolingParams),
    "add_generation_prompt": {"type": "boolean"},
    "best_of": {"type": "integer"},
    "chat_template": {"type": "string"},
    "chat_template_kwargs": {"type": "object"},
    "documents": {"type": "array"},
    "input": TEXT_OR_OBJECTS,
    "inputs": of_hint(str | list[str] | list[list[str]]),
    "max_completion_tokens": {"type": "integer"},
    "max_output_tokens": {"type": "integer"},
    "messages": OBJECTS | {"minItems": 1},
    "metadata": {"type": "object"},
    "normalize": {"type": "boolean"},
    "reasoning_effort": {"type": "string"},
    "schema": {"type": "object"},
    "stop_sequences": of_hint(list[str]),
    "system": TEXT_OR_OBJECTS,
    "tokens": of_hint(list[int]),
    "tool_choice": {"anyOf": [{"type": "string"}, {"type": "object"}]},
    "tools": OBJECTS,
    "top_logprobs": {"type": "integer"},
}


def _of_sampling() -> dict[str, Json]:
    """Of each field that `Fields.sampling` takes."""
    known, form = of_hints(SamplingParams), of_hints(StructuredOutputsParams)
    made = {name: form.get(name.removeprefix("guided_"), {"type": "object"}) for name in SAMPLING - known.keys()}
    return {name: schema for name, schema in (known | made).items() if name in SAMPLING}


class Recorder(Fields):
    """Fields that note what is asked of them. schema: of the object, which is filled in."""

    def __init__(self, body: Any, schema: Json, where: str = ""):
        super().__init__(body, where)
        self._schema = schema
        schema |= {"type": "object", "properties": schema.get("properties", {})}

    def _note(self, name: str, schema: Mapping[str, Any]) -> Json:
        """The first to say something of a field is right."""
        properties = self._schema["properties"]
        properties[name] = properties.get(name) or dict(schema)
        return properties[name]

    def __contains__(self, name: str) -> bool:
        self._note(name, CHECKED.get(name, {}))
        return super().__contains__(name)

    def take(self, name: str, default: Any = None) -> Any:
        self._note(name, CHECKED.get(name, {}))
        return super().take(name, default)

    def skip(self, names: Iterable[str]) -> None:
        for name in (names := list(names)):
            self._note(name, CHECKED.get(name, {"description": "taken, and without a meaning here"}))
        super().skip(names)

    def flag(self, name: str, default: bool = False) -> bool:
        self._note(name, {"type": "boolean", "default": default})
        return super().flag(name, default)

    def text(self, name: str, default: str | None = None) -> str | None:
        self._note(name, {"type": "string"})
        return super().text(name, default)

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int | None:
        self._note(name, {"type": "integer", "minimum": low, "maximum": high})
        return super().integer(name, low, high, default)

    def prompts(self, name: str) -> list[str | list[int]]:
        self._note(name, PROMPTS)
        return super().prompts(name)

    def texts(self, name: str) -> list[str]:
        self._note(name, of_hint(str | list[str]))
        return super().texts(name)

    def choice(self, name: str, choices: tuple[str, ...], default: str) -> str:
        self._note(name, {"enum": list(choices)})
        return super().choice(name, choices, default)

    def only(self, name: str, *values: Any, remedy: str = "leave it out") -> None:
        self._note(name, {"enum": list(values)} if values else {"type": "null"})
        super().only(name, *values, remedy=remedy)

    def inner(self, name: str) -> Fields | None:
        schema = self._note(name, {"type": "object"})
        return Recorder(super().take(name), schema, self._at(name)) if super().__contains__(name) else None

    def sampling(self) -> dict[str, Any]:
        for name, schema in _of_sampling().items():
            self._note(name, schema)
        return super().sampling()

    def refuse(self, name: str, taken: Mapping[str, Any]) -> None:
        self._schema["properties"].pop(name, None)
        super().refuse(name, taken)

    def end(self) -> None:
        self._schema["additionalProperties"] = False
        super().end()


def body_schema(read: Callable[[Fields], Any], examples: Sequence[Json]) -> Json:
    """Of the bodies that a reader takes. A field is required if no example can do without it. examples: all that is
    read only where it is given is in one of them."""
    schema: Json = {}
    for example in examples:
        read(Recorder(example, schema))
    required = [{name for name in example if not _reads(read, example, name)} for example in examples]
    schema["required"] = sorted(set.intersection(*required))
    return _with_null(schema)


def _reads(read: Callable[[Fields], Any], example: Json, name: str) -> bool:
    """Whether an example may do without a field."""
    try:
        read(Fields({other: value for other, value in example.items() if other != name}))
    except RequestError:
        return False
    return True


def _with_null(schema: Json) -> Json:
    """With null in place of what may be left out, which it is as good as."""
    required = schema.get("required", ())
    inner = {
        name: _with_null(entry) if "properties" in entry else entry for name, entry in schema["properties"].items()
    }
    return schema | {
        "properties": {name: entry if name in required else _or_null(entry) for name, entry in inner.items()}
    }


def _or_null(schema: Json) -> Json:
    if "enum" in schema:
        return schema | {"enum": [*schema["enum"], None]}
    if "anyOf" in schema:
        return schema | {"anyOf": [*schema["anyOf"], {"type": "null"}]}
    return schema | {"type": [schema["type"], "null"]} if schema.get("type", "null") != "null" else schema
