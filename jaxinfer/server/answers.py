"""Answers: JSON, and streams of server-sent events that end when the client goes, or reads too slowly.

Format: https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Mapping
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jaxinfer.openai.errors import ServerError, error_body, message_error

PING_SECONDS = 15.0  # without a frame, then a comment keeps proxies from closing the connection
WRITE_SECONDS = 60.0  # a frame that can't be sent for so long ends the request
Result = TypeVar("Result")


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def while_connected(receive: Receive, work: Awaitable[Result]) -> Result:
    """Runs work and cancels it when the client goes. Raises ClientGone then. The body must have been read."""
    task = asyncio.current_task()
    assert task is not None
    watcher = asyncio.ensure_future(_gone(receive))
    gone = False

    def leave(_: asyncio.Future[None]) -> None:
        nonlocal gone
        if not watcher.cancelled():
            gone = True
            task.cancel()

    watcher.add_done_callback(leave)
    try:
        return await work
    except asyncio.CancelledError:
        if gone and task.uncancel() == 0:
            raise ClientGone from None
        raise
    finally:
        watcher.remove_done_callback(leave)
        watcher.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def json_answer(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json.dumps(body), status, headers, "application/json")


def error_answer(error: ServerError, path: str, request_id: str) -> Response:
    """In the form of the API that the path is of."""
    if path.startswith("/v1/messages"):
        return json_answer(message_error(str(error), error.status, request_id), error.status, error.headers)
    return json_answer(error_body(str(error), error.status, error.param, error.code), error.status, error.headers)


class EventStream(Response):
    """Sends frames as they come, whole events each."""

    def __init__(self, frames: AsyncGenerator[bytes, None]):
        self.status_code, self.background = 200, None
        self.init_headers(
            {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no"}
        )
        self._frames = frames
        self._last, self._writing, self._stuck = 0.0, False, False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        self._last = time.monotonic()
        task = asyncio.current_task()
        assert task is not None
        pings = asyncio.ensure_future(self._watch(send, task))
        try:
            async with contextlib.aclosing(self._frames):
                await while_connected(receive, self._send(send))
        except asyncio.CancelledError:
            if self._stuck and task.uncancel() == 0:
                raise ClientGone from None
            raise
        finally:
            pings.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send) -> None:
        async for frame in self._frames:
            if frame:
                self._last, self._writing = time.monotonic(), True
                await send({"type": "http.response.body", "body": frame, "more_body": True})
                self._writing = False

    async def _watch(self, send: Send, task: asyncio.Task[Any]) -> None:
        """Cancels the task where nobody reads; says something where there is nothing to say for long."""
        while True:
            await asyncio.sleep(min(PING_SECONDS, WRITE_SECONDS) / 2)
            silent = time.monotonic() - self._last
            if self._writing and silent >= WRITE_SECONDS:
                self._stuck = True
                task.cancel()
                return
            if not self._writing and silent >= PING_SECONDS:
                self._last = time.monotonic()
                await send({"type": "http.response.body", "body": b": ping\n\n", "more_body": True})
