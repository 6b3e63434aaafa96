"""The fields of rows that mean something, checked. All raise ValueError, one line that names the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxinfer.batch.values import json_value, parse_json
from jaxinfer.openai.fields import kind, with_int_bias
from jaxinfer.sampling.ids import is_id

FORMS = ("prompt", "messages", "text", "prompt_token_ids")


def text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, and is {kind(value)}")
    return value


def decoded(row: Mapping[str, Any], name: str) -> Any:
    """A list or an object, or the same as JSON in text: CSV has nothing else. None for text that is empty."""
    value = row.get(name)
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    problems: list[str] = []
    try:
        value = json_value(parse_json(value), problems)
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ValueError(f"{name} is text, and as JSON it is no good: {problems[0]}")
    return value


def token_ids(name: str, value: Any) -> list[int]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} must be a list of token ids, and is {kind(value)}{' without any' * (value == [])}")
    for i, token in enumerate(value):
        if not is_id(token) or not 0 <= token < 2**31:
            raise ValueError(f"{name}[{i}] is {token!r:.40}, and no token id")
    return value


def tools(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """`tools`, JSON schemas; None where there are none."""
    schemas = decoded(row, "tools")
    if schemas is not None and not (isinstance(schemas, list) and all(isinstance(tool, dict) for tool in schemas)):
        raise ValueError("tools must be a list of JSON schemas, each an object")
    return schemas or None


def own_params(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row's own sampling parameters; those that are null are not given."""
    there = {name: decoded(row, name) for name in ("params", "sampling_params")}
    there = {name: value for name, value in there.items() if value is not None}
    if len(there) > 1:
        raise ValueError("there are both params and sampling_params: leave one out")
    for name, params in there.items():
        if not isinstance(params, dict):
            raise ValueError(f"{name} must be an object of sampling parameters, and is {kind(params)}")
        return with_int_bias({parameter: value for parameter, value in params.items() if value is not None})
    return {}
