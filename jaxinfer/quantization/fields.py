"""Fields of a config.json's `quantization_config`, checked one by one: errors name the field and its value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Config = Mapping[str, Any]


def one_of(fields: Config, name: str, *values: Any, where: str = "", remedy: str = "") -> Any:
    value = fields.get(name) if isinstance(fields, Mapping) else fields
    if not any(type(value) is type(option) and value == option for option in values):
        choice = ", ".join("nothing" if option is None else repr(option) for option in values)
        raise unsupported(f"{where}{name}", value, f"{choice} can be read{remedy}")
    return value


def group_size(fields: Config, name: str, where: str = "") -> int:
    """0: all of them."""
    size = fields.get(name)
    if type(size) is not int or (size < 1 and size != -1):
        raise unsupported(f"{where}{name}", size, "a number, or -1, is needed")
    return max(size, 0)


def block(fields: Config, name: str, where: str) -> tuple[int, int]:
    sizes = fields.get(name)
    if not isinstance(sizes, list) or len(sizes) != 2 or not all(type(n) is int and n > 0 for n in sizes):
        raise unsupported(f"{where}{name}", sizes, "two numbers are needed")
    return sizes[0], sizes[1]


def names(fields: Config, name: str) -> list[str]:
    entries = fields.get(name) or []
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise unsupported(name, entries, "a list of names is needed")
    return entries


def unsupported(name: str, value: Any, why: str = "it is not supported") -> ValueError:
    field = f"quantization_config.{name}" if name else "quantization_config"
    return ValueError(
        f"config.json: {field} is {value!r:.100}: {why}; or take the original checkpoint, and `quantization`"
    )
