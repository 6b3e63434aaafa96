"""What there is to know of an option, and whether a value is right."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

POOLINGS = {"CLS": "cls", "LAST": "lasttoken", "MEAN": "mean"}  # vLLM's names, and sentence-transformers'
OF_TOKENS = ("ALL", "STEP")  # those that give a row of numbers of each token
POOLER_FIELDS = ("pooling_type", "normalize", "use_activation", "dimensions", "step_tag_id", "returned_token_ids")


def check_pooler_config(value: object) -> None:
    """Raises ValueError for what can't be a `pooler_config`."""
    if value is None:
        return
    known = (*POOLINGS, *OF_TOKENS)
    fine = isinstance(value, Mapping) and value.keys() <= set(POOLER_FIELDS) and bool(value)
    fine = fine and all(value.get(n) in (None, True, False) for n in ("normalize", "use_activation"))  # type: ignore[attr-defined]
    if not fine or value.get("pooling_type") not in (None, *known):  # type: ignore[attr-defined]
        raise ValueError(
            f"pooler_config is {value!r:.100}: it must be a dict with pooling_type, one of {', '.join(known)}, and "
            f"perhaps {', '.join(POOLER_FIELDS[1:])}"
        )


def check_adapters(value: object) -> None:
    """Raises ValueError for what can't be `adapters`."""
    fine = value is None or isinstance(value, Mapping)
    for name, folder in value.items() if isinstance(value, Mapping) else ():
        fine = fine and isinstance(name, str) and bool(name) and isinstance(folder, str | os.PathLike) and bool(folder)
    if not fine:
        raise ValueError(f"adapters is {value!r:.100}: it must be a dict of names and folders or hub ids")


@dataclass(frozen=True)
class Option:
    """What there is to know of one option besides its type.

    default: None also where the machine or the model decides.
    help: a line for the command line.
    details: what the documentation says in its place.
    metavar: as in `--help`.
    low, high: an integer is in between or one of the two, a float is above low and at most high; high may be infinite.
    must_be: what else a value is, in an error.
    check: of the value, in place of one by its type; raises ValueError.
    none_is_default: None may be given for the default, as in vLLM.
    is_data: a deployment may have it.
    shapes_programs: compiled programs are for one value of it.
    of_process_0: of several hosts only the first has to do with it, as it is about text or people.
    """

    default: Any = None
    help: str = ""
    details: str = ""
    metavar: str | None = None
    low: int = 1
    high: float = math.inf
    must_be: str = ""
    check: Callable[[object], None] | None = None
    none_is_default: bool = False
    is_data: bool = True
    shapes_programs: bool = False
    of_process_0: bool = False


@dataclass(frozen=True)
class Declared:
    """One option as EngineConfig declares it.

    kind: its type.
    option: the rest.
    """

    kind: Any
    option: Option

    @property
    def choices(self) -> tuple[str, ...]:
        """Of a Literal; else none."""
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    @property
    def kinds(self) -> tuple[Any, ...]:
        """The classes that values may be of."""
        union = get_origin(self.kind) in (Union, UnionType)
        return tuple(get_origin(kind) or kind for kind in (get_args(self.kind) if union else (self.kind,)))

    def check(self, name: str, value: Any) -> None:
        """Raises ValueError that says what it must be."""
        option, kinds = self.option, self.kinds
        low, high = option.low, option.high
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if option.check is not None:
            option.check(value)
            return
        if self.choices:
            fits, wanted = value in self.choices, f"one of {', '.join(self.choices)}"
        elif int in kinds:
            fits = isinstance(value, kinds) and (value is None or (is_number and low <= value <= high))
            wanted = f"an integer of at least {low}" if high == math.inf else f"an integer from {low} to {high}"
        elif float in kinds:
            fits, wanted = is_number and low < value <= high, f"a number above {low} and at most {high}"
        else:
            fits, wanted = isinstance(value, kinds), option.must_be or "true or false"
        if not fits:
            raise ValueError(f"{name} is {value!r:.100}: it must be {wanted}")
