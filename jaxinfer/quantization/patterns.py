"""Regular expressions that a checkpoint gives: those that can't take for ever."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

LENGTH = 32  # a module's name, about; its characters are shared by all repetitions
MOST = LENGTH**5  # ways of matching: some tenths of a second, at worst


@functools.lru_cache(maxsize=1024)
def compile_pattern(text: str) -> re.Pattern[str]:
    """Raises ValueError for what is none, and where there are so many ways in which it may match that trying them takes
    for ever, which nothing stops."""
    try:
        pattern = re.compile(text)
        ways = _ways(re._parser.parse(text))  # type: ignore[attr-defined]
    except (re.error, OverflowError, RecursionError):
        raise ValueError("it is no regular expression") from None
    if ways > MOST:
        raise ValueError("it repeats too much: it may take for ever to match")
    return pattern


def _ways(parsed: Any) -> float:
    """In how many ways a name of LENGTH may match, at most."""
    count = 1.0
    for operator, argument in parsed:
        match str(operator):
            case "BRANCH":
                count *= sum(map(_ways, argument[1]))
            case "SUBPATTERN":
                count *= _ways(argument[3])
            case "ASSERT" | "ASSERT_NOT":
                count *= _ways(argument[1])
            case "ATOMIC_GROUP":
                count *= _ways(argument)
            case "GROUPREF_EXISTS":
                count *= sum(_ways(branch) for branch in argument[1:] if branch is not None)
            case "MAX_REPEAT" | "MIN_REPEAT" | "POSSESSIVE_REPEAT":
                low, high, inner = argument
                most, ways = min(high, LENGTH), _ways(inner)
                count *= (most + 1 - min(low, most)) * (math.inf if ways > MOST else ways**most)
        if count > MOST:
            return math.inf
    return count
