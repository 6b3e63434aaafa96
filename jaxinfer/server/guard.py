"""What every request goes through: who it is from, whether it may, its id, its errors, its line in the log."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import re
import secrets
import time
from contextlib import nullcontext

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxinfer.openai.errors import ServerError, server_error
from jaxinfer.server.answers import ClientGone, error_answer
from jaxinfer.server.service import Service

log = logging.getLogger("jaxinfer.access")
PUBLIC = frozenset({"/", "/health", "/ready", "/ping"})
OBSERVED = frozenset({"/metrics", "/load"})
CLIENT_GONE = 499  # in the log and in counts, as nginx has it
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]


LATER = {"retry-after": "1", "connection": "close"}


class Guard:
    """Around the routes."""

    def __init__(self, app: ASGIApp, service: Service):
        self._app, self._service = app, service
        self._digests = service.config.digests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope)
        given = request.headers.get("x-request-id", "")
        # It goes into the log and into a header.
        request_id = given if re.fullmatch(r"[\w.:\-]{1,128}", given, re.ASCII) else secrets.token_hex(16)
        tracing = self._service.tracing if request.method == "POST" else None
        with nullcontext() if tracing is None else tracing.span(request.headers, request_id):
            status = await self._handle(request, request_id, receive, send)
            if tracing is not None:
                tracing.answered(status)

    async def _handle(self, request: Request, request_id: str, receive: Receive, send: Send) -> int:
        """Its status."""
        scope, start, status, begun = request.scope, time.perf_counter(), 0, False

        async def answer(message: Message) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                status, begun = message["status"], True
                # Under both names: OpenAI's clients read the first, Anthropic's the second.
                ids = [(name, request_id.encode()) for name in (b"x-request-id", b"request-id")]
                message["headers"] = [*message["headers"], *HEADERS, *ids]
            await send(message)

        async def fail(error: ServerError) -> None:
            if not begun:
                await error_answer(error, request.url.path, request_id)(scope, receive, answer)

        scope["state"] |= {"request_id": request_id, "name": secrets.token_hex(16)}
        scope["app"] = self  # so that routes raise what they can't do
        try:
            if scope["state"].get("crowded"):
                raise ServerError(503, "there are too many connections; try again later", headers=LATER)
            self._check_host(request)
            scope["state"]["key"] = self._key(request)
            await self._app(scope, receive, answer)
        except (ClientGone, ClientDisconnect, ConnectionError):
            status = CLIENT_GONE
        except asyncio.CancelledError:  # at the end, where the device takes too long to stop
            await fail(ServerError(503, "the server is shutting down; try another one"))
        except HTTPException as error:
            text = {404: "there is nothing here", 405: f"{request.method} is not for this path"}
            said = text.get(error.status_code, error.detail)
            await fail(ServerError(error.status_code, said, headers=dict(error.headers or {})))
        except Exception as error:
            failure = server_error(error)
            failure.args = (str(failure).replace(str(self._service.llm.folder), "the model"),)
            if failure.status == 500:
                log.error("request %s failed", request_id, exc_info=not isinstance(error, ServerError))
            await fail(failure)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._service.metrics.http[route, request.method, status] += 1
            milliseconds = (time.perf_counter() - start) * 1000
            client = scope["client"][0] if scope.get("client") else "-"
            # Paths are percent-encoded as they came, so that nobody writes lines of his own.
            path = scope.get("raw_path", b"").decode("ascii", "replace")[:200]
            log.info("id=%s client=%s %s %s %d %.1fms", request_id, client, request.method, path, status, milliseconds)
        return status

    def _check_host(self, request: Request) -> None:
        """A page of another site that has made its name mean this machine says that name. Keys it does not know."""
        config = self._service.config
        if config.api_keys or config.uds is not None:
            return
        host = re.sub(r":\d*$", "", request.headers.get("host", "")).strip("[]").lower().rstrip(".")
        if host in {"localhost", config.host.lower(), *map(str.lower, config.allowed_hosts)}:
            return
        try:
            ipaddress.ip_address(host)
        except ValueError:
            raise ServerError(
                403, "this server does not go by that name: reach it as localhost, or start it with --allowed-host"
            ) from None

    def _key(self, request: Request) -> int | None:
        """Which key the request has; None where none is needed. Raises ServerError."""
        path, config = request.scope["path"], self._service.config
        if (
            not self._digests
            or path in PUBLIC
            or path.startswith("/page/")
            or (config.public_metrics and path in OBSERVED)
        ):
            return None
        kind, _, bearer = request.headers.get("authorization", "").partition(" ")
        given = bearer.strip() if kind.lower() == "bearer" else request.headers.get("x-api-key", "")
        digest = hashlib.sha256(given.encode("latin-1", "replace")).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]  # all of them, whichever it is
        if not any(matches):
            raise ServerError(
                401,
                "there is no API key, or it is none of this server's",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        return matches.index(True)
