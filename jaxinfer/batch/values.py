"""JSON, strictly, and the values of other formats as JSON."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np

MAX_DEPTH = 100  # of lists and objects: who writes the row must not run out of stack either


def parse_json(text: str | bytes) -> Any:
    """What JSON says. Unlike json.loads, this refuses NaN, numbers beyond floats, and keys
    that are there twice. Raises ValueError."""
    try:
        return _DECODER.decode(text if isinstance(text, str) else text.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1}") from None
    except ValueError as error:
        too_long = "integer string conversion" in str(error)  # its remedy is none for who writes the row
        raise ValueError("an integer has thousands of digits" if too_long else str(error)) from None
    except RecursionError:
        raise ValueError("not usable JSON: nested too deep") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r:.80} is there twice")
    return members


def _constant(name: str) -> NoReturn:
    raise ValueError(f"not JSON: {name} is no number there; write null")


def _float(digits: str) -> float:
    """Raises ValueError for what a float has no value near: it would be written down as null, or as 0."""
    value = float(digits)
    if math.isinf(value) or (value == 0 and re.match(r"-?[0.]*[1-9]", digits)):
        raise ValueError(f"the number {digits:.40} is beyond what a float can be; write it as text")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)


def json_value(value: Any, problems: list[str], depth: int = 0) -> Any:
    """A value of JSON, CSV or Parquet with nothing but JSON's types in it: bytes as base64; times, decimals and what
    else there may be as their text.

    What can't be written down again is replaced, and said in `problems`: text that is not Unicode (from `\\ud800` in
    JSON, or bytes that are not UTF-8) and nesting that is too deep.
    """
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                problems.append(f"not valid Unicode at character {error.start + 1}")
                return printable(value)
        return value
    if depth >= MAX_DEPTH:
        problems.append(f"nested deeper than {MAX_DEPTH}")
        return None
    if isinstance(value, Mapping):
        return {json_value(str(k), problems): json_value(v, problems, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item, problems, depth + 1) for item in value]
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


def printable(text: str) -> str:
    """Text with what is not Unicode in it replaced."""
    return text.encode(errors="replace").decode()


def numbers(vector: np.ndarray) -> list[float]:
    """Of float32, as JSON has them: the shortest that are read as the same ones."""
    return [float(number) for number in vector.astype(str)]


_ENCODE = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=str).encode


def to_json(value: Any) -> str:
    """JSON of anything on one line. What JSON has no form for is a string (times, bytes), or null (NaN, infinity)."""
    try:
        text = _ENCODE(value)
    except ValueError:
        text = json.dumps(_finite(value), ensure_ascii=False, default=str)
    # Half of a surrogate pair has no UTF-8, but an escape.
    return text if is_text(text) else json.dumps(json.loads(text))


def is_text(value: str) -> bool:
    """Whether it is Unicode, without half of a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(element) for key, element in value.items()}
    return [_finite(element) for element in value] if isinstance(value, list | tuple) else value
