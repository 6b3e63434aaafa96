"""Latency of a server, of this kind or another one that speaks OpenAI, as its clients see it. It is asked in an open
loop: requests come when they come, whether or not those before are done, unless there may be only so many at a time."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Self, TypeAlias
from urllib.parse import urlsplit

from jaxinfer.benchmark import Trace, Work

LIMIT = 2**24  # of a line
ENDS = {b"transfer-encoding", b"content-length"}  # of answers that end before their connection does
Connection: TypeAlias = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Server:
    """Where it is, and connections to it: they are kept for the next request, as clients do. Raises ValueError for
    what is no URL of a server.

        async with Server("http://127.0.0.1:8000") as server:
    """

    def __init__(self, url: str, api_key: str | None = None):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"URL is {url!r}: it must be as http://127.0.0.1:8000")
        self._host, self._tls = parts.hostname, parts.scheme == "https"
        self._port = parts.port or (443 if self._tls else 80)
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self._name = parts.netloc.rpartition("@")[2]
        self._key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._idle: list[Connection] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *why: object) -> None:
        for _, writer in self._idle:
            writer.close()

    async def lines(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> AsyncIterator[bytes]:
        """Those of an answer, as they come. Raises OSError, and ValueError for an answer other than 200."""
        connection = await self._connection()
        reader, writer = connection
        whole = False
        try:
            content = b"" if body is None else json.dumps(body).encode()
            head = f"{method} {self._path}{path} HTTP/1.1\r\nHost: {self._name}\r\n{self._key}"
            head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
            writer.write(head.encode() + content)
            status = (await reader.readline()).split(b" ")
            headers = {}
            while (header := (await reader.readline()).strip()) != b"":
                name, _, value = header.lower().partition(b":")
                headers[name] = value.strip()
            rest = b""
            said = b""
            async for piece in _pieces(reader, headers):
                *lines, rest = (rest + piece).split(b"\n")
                if status[1:2] == [b"200"]:
                    for line in lines:
                        yield line
                else:
                    said += piece
            if status[1:2] != [b"200"]:
                raise ValueError(f"{path} was answered {b' '.join(status).decode().strip()}: {said.decode():.300}")
            whole = headers.get(b"connection") != b"close" and headers.keys() & ENDS != set()
            yield rest
        finally:
            if whole:
                self._idle.append(connection)
            else:
                writer.close()

    async def _connection(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if not connection[0].at_eof():
                return connection
            connection[1].close()
        context = ssl.create_default_context() if self._tls else None
        return await asyncio.open_connection(self._host, self._port, ssl=context, limit=LIMIT)

    async def model(self) -> str:
        """The first one that it has."""
        answer = b"".join([line async for line in self.lines("GET", "/v1/models")])
        return str(json.loads(answer)["data"][0]["id"])


async def _pieces(reader: asyncio.StreamReader, headers: Mapping[bytes, bytes]) -> AsyncIterator[bytes]:
    """Of an answer's body."""
    if headers.get(b"transfer-encoding") == b"chunked":
        while size := int((await reader.readline()).split(b";")[0] or b"0", 16):
            yield (await reader.readexactly(size + 2))[:-2]
        await reader.readline()
    elif b"content-length" in headers:
        yield await reader.readexactly(int(headers[b"content-length"]))
    else:
        while piece := await reader.read(2**16):
            yield piece


async def serve(
    server: Server, model: str, work: Sequence[Work], arrivals: Sequence[float], max_concurrency: int | None = None
) -> list[Trace]:
    """Sends requests at the given seconds, as `jaxinfer.benchmark.serve`. max_concurrency: at most so many at a time:
    others arrive when one of these is done. Raises what `Server.lines` raises."""
    start = time.perf_counter()
    places = asyncio.Semaphore(max_concurrency or max(len(work), 1))
    traces = [Trace(start + arrival) for arrival in arrivals]
    async with asyncio.TaskGroup() as tasks:
        for trace, request in zip(traces, work, strict=True):
            tasks.create_task(_request(places, server, model, request, trace))
    return traces


async def _request(places: asyncio.Semaphore, server: Server, model: str, work: Work, trace: Trace) -> None:
    await asyncio.sleep(max(0.0, trace.arrival - time.perf_counter()))
    waits = places.locked()
    async with places:
        if waits:
            trace.arrival = time.perf_counter()
        await _answer(server, model, work, trace)


async def _answer(server: Server, model: str, work: Work, trace: Trace) -> None:
    body: dict[str, Any] = {"model": model, "prompt": work.prompt, "max_tokens": work.output_len, "temperature": 0.0}
    body |= {"ignore_eos": True, "stream": True}
    body |= {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    done, ended = 0, False
    async for line in server.lines("POST", "/v1/completions", body):
        ended |= line.strip() == b"data: [DONE]"
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if "error" in event:
            raise ValueError(f"the server says: {event['error']['message']}")
        if not event["choices"]:
            continue
        ended |= event["choices"][0].get("finish_reason") is not None
        usage = event.get("usage")
        count = usage["completion_tokens"] if usage else done + bool(event["choices"][0]["text"])
        if count > done:
            trace.times.append(time.perf_counter())
            trace.tokens.append(count - done)
            done = count
    if not trace.times:
        raise ValueError("the server has answered nothing")
    if not ended:
        raise ValueError(f"the server has broken an answer off after {done} of {work.output_len} tokens")


def goodput(traces: Sequence[Trace], seconds: float, limits: Mapping[str, float]) -> float:
    """Requests a second that keep all limits, in milliseconds: of ttft, tpot, e2el."""

    def good(trace: Trace) -> bool:
        tpot = trace.tpot
        figures = {"ttft": trace.ttft, "e2el": trace.e2el, "tpot": tpot[0] if tpot else 0.0}
        return all(1000 * figures[name] <= limit for name, limit in limits.items())

    return sum(map(good, traces)) / seconds
