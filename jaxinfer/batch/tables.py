"""Columns that are the same for all parts of a job, whatever rows come."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from jaxinfer.batch.values import is_text

Kind = Literal[
    "bool", "int64", "float64", "string", "list<bool>", "list<int32>", "list<int64>", "list<float64>", "list<string>",
    "json", "as read",
] | int  # fmt: skip  # a number: vectors of so many float32
PLAIN: dict[type, Kind] = {bool: "bool", int: "int64", float: "float64", str: "string"}
LISTS: dict[Kind, Kind] = {
    "bool": "list<bool>",
    "int64": "list<int64>",
    "float64": "list<float64>",
    "string": "list<string>",
}


def column_kinds(sample: Iterable[Mapping[str, Any]], results: Mapping[str, Kind]) -> dict[str, Kind]:
    """The columns of all parts: those of the sample, and the results.

    sample: the carried columns of the first rows of the input (those of part 0, for every shard). A column of booleans,
    integers, numbers or strings, or of lists of them, is one; anything else (objects, a mixture, nulls only) is JSON.
    """
    seen: dict[str, set[Any]] = {}
    for row in sample:
        for column, value in row.items():
            seen.setdefault(column, set()).update([] if value is None else [_kind(value)])
    return {c: _common(kinds) for c, kinds in seen.items() if c not in results} | dict(results)


def fitting(rows: Sequence[Mapping[str, Any]], kinds: Mapping[str, Kind], others: str) -> list[dict[str, Any]]:
    """The rows with what does not fit, a value of another kind or in a column that is not there, in an object in the
    column `others`, which only rows have that need it. Nothing is lost and no row fails."""
    fitted = []
    for row in rows:
        apart = {c: v for c, v in row.items() if c != others and v is not None and not fits(v, kinds.get(c))}
        kept = {c: v for c, v in row.items() if c in kinds and c not in apart}
        apart |= row.get(others) or {}
        fitted.append(kept | {others: apart} if apart else kept)
    return fitted


def fits(value: Any, kind: Kind | None) -> bool:
    """Whether a column of this kind can have exactly this value."""
    match kind:
        case None:
            return False
        case "int64":
            return type(value) is int and -(2**63) <= value < 2**63
        case "float64":
            return type(value) is float or (type(value) is int and abs(value) <= 2**53)
        case "string":
            return type(value) is str and is_text(value)
        case "bool":
            return type(value) is bool
        case "list<bool>" | "list<int64>" | "list<float64>" | "list<string>":
            item = next(plain for plain, listed in LISTS.items() if listed == kind)
            return isinstance(value, list) and all(element is None or fits(element, item) for element in value)
    return True


def _kind(value: Any) -> Kind | tuple[()]:
    """The kind of column for one value; () is of lists without anything in them."""
    if isinstance(value, list):
        items = {_kind(item) for item in value if item is not None}
        common = _common(items)
        return () if not items else LISTS.get(common, "json")
    plain = PLAIN.get(type(value))
    return plain if plain and fits(value, plain) else "json"


def _common(kinds: set[Any]) -> Kind:
    lists: set[Kind] = kinds - {()}
    pairs: list[tuple[Kind, Kind]] = [("int64", "float64"), ("list<int64>", "list<float64>")]
    if len(lists) != len(kinds) and not lists <= set(LISTS.values()):
        return "json"
    for low, high in pairs:
        if lists == {low, high}:
            return high
    return lists.pop() if len(lists) == 1 else "json"
