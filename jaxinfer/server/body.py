"""A request's body: read within bounds, and what its JSON says."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any, NoReturn

from starlette.requests import Request

from jaxinfer.openai.errors import ServerError

MAX_DEPTH = 64  # of lists and objects
BODY_SECONDS = 60.0  # to send it in


async def read_json(request: Request, most: int) -> dict[str, Any]:
    """The object that a request brings. Raises ServerError. most: bytes."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # What a web page may send anywhere without being asked is none of these.
    if kind != "application/json":
        raise ServerError(415, "the body must be JSON, and Content-Type must say application/json")
    if request.headers.get("content-encoding", "identity") != "identity":
        raise ServerError(415, "the body must not be compressed: leave Content-Encoding out")
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and len(declared) < 20 and int(declared) > most:
        raise too_large(most)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    raise too_large(most)
    except TimeoutError:
        raise ServerError(408, f"the body did not come within {BODY_SECONDS:.0f} s") from None
    value = await asyncio.to_thread(parsed, bytes(body)) if len(body) > 2**16 else parsed(bytes(body))
    if not isinstance(value, dict):
        raise ServerError(400, "the body must be a JSON object")
    return value


def too_large(most: int) -> ServerError:
    return ServerError(413, f"the body has more than {most} bytes, the limit here", headers={"connection": "close"})


def parsed(body: bytes) -> Any:
    """What JSON says: no NaN, no numbers beyond floats, nothing nested too deep. Raises ServerError."""
    try:
        value = json.loads(body.decode(), parse_constant=_constant, parse_float=_float)
    except UnicodeDecodeError as error:
        raise ServerError(400, f"the body is not UTF-8 at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise ServerError(400, f"the body is not JSON: {error.msg} at character {error.pos + 1}") from None
    except ValueError as error:
        too_long = "integer string conversion" in str(error)
        raise ServerError(400, "the body has an integer of thousands of digits" if too_long else str(error)) from None
    except RecursionError:
        raise _too_deep() from None
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH:
        _check_depth(value)
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        inner = [entry.values() if isinstance(entry, dict) else entry for entry in level]
        level = [item for entries in inner for item in entries if isinstance(item, dict | list)]
        if not level:
            return
    raise _too_deep()


def _too_deep() -> ServerError:
    return ServerError(400, f"the body is nested deeper than {MAX_DEPTH}, the limit here")


def _constant(name: str) -> NoReturn:
    raise ValueError(f"the body is not JSON: {name} is no number there")


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"the body has a number beyond what a float can be: {digits:.40}")
    return value
