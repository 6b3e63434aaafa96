import enum
from collections.abc import Callable
from typing import Any, Literal, Optional, Union

import pytest

from jaxinfer.text.tools import function_schema, tool_schema

utils = pytest.importorskip("transformers.utils")


class Unit(enum.Enum):
    CELSIUS = "c"
    FAHRENHEIT = "f"


def weather(location: str, unit: Unit = Unit.CELSIUS, days: int | None = None) -> dict[str, float]:
    """
    Looks up the weather,
    in more than one line.

    Args:
        location: Where: a town,
            with its country.
        unit: The unit
        days: How many days (choices: [1, 3, 7])

    Returns:
        The temperature of each day.
    """
    raise NotImplementedError(location, unit, days)


def everything(
    a: list[int],
    b: dict[str, list[float]],
    c: Literal["x", 1],
    d: Union[int, str],  # noqa: UP007
    e: Optional[list[str]],  # noqa: UP045
    f: tuple[int, str],
    g: Any,
    h: bool = True,
    i: list = [],  # noqa: B006
    j: int | list[int] = 0,
) -> "Callable[[], int]":
    """Takes everything.

    Args:
        a: A
        b: B
        c: C
        d: D
        e: E
        f: F
        g: G
        h: H
        i: I
        j: J
    """
    raise NotImplementedError


def nothing() -> None:
    """Does nothing."""


class Robot:
    def move(self, far: float) -> bool:
        """Moves.

        Args:
            far: Metres
        """
        return far > 0


@pytest.mark.parametrize("function", [weather, everything, nothing, Robot().move])
def test_as_transformers(function: Callable[..., Any]) -> None:
    assert function_schema(function) == utils.get_json_schema(function)
    assert tool_schema(function) == function_schema(function)


def test_schema_passes_through() -> None:
    schema = {"type": "function", "function": {"name": "f"}}
    assert tool_schema(schema) is schema


def undocumented(x: int) -> None: ...


def untyped(x) -> None:  # type: ignore[no-untyped-def]
    """Text.

    Args:
        x: X
    """


def undescribed(x: int) -> None:
    """Text."""


def strange(x: "Callable[[], int]") -> None:
    """Text.

    Args:
        x: X
    """


def unresolved(x: "Missing") -> None:  # type: ignore[name-defined]  # noqa: F821
    """Text.

    Args:
        x: X
    """


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (undocumented, r"undocumented\(\): no docstring"),
        (untyped, r"untyped\(\): argument x has no type annotation"),
        (undescribed, r"undescribed\(\): argument x is not described"),
        (strange, "has no JSON schema"),
        (unresolved, "annotations can't be read"),
        (3, "expected a JSON schema .* found int"),
        (print, "expected a JSON schema"),
    ],
)
def test_bad_tools(function: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        tool_schema(function)
    assert "\n" not in str(caught.value)
