"""What tests of bad input share."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxinfer import LLM

HUGE = 10**400  # JSON has integers that no float can hold


def change(folder: Path, name: str = "config.json", **fields: object) -> None:
    """Sets fields of a JSON file; ... removes one."""
    path = folder / name
    content = json.loads(path.read_text()) if path.exists() else {}
    content |= fields
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def line(call: Callable[[], object], kind: type[Exception] | tuple[type[Exception], ...] = ValueError) -> str:
    """The one line that the call is refused with."""
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert 10 < len(text) < 2000
    return text


def refusal(folder: object, *facts: object, kind: type[Exception] = ValueError, **options: object) -> str:
    """Loading is refused, and the line has these facts."""
    text = line(lambda: LLM(folder, **options), kind)
    assert all(str(fact) in text for fact in facts), text
    return text
