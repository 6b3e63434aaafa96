"""Errors in OpenAI's form and in Anthropic's, and their HTTP status."""

from __future__ import annotations

from typing import Any

from jaxinfer.errors import ContextLengthError, EngineClosed, QueueFullError, RequestError

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable",
}
# https://docs.anthropic.com/en/api/errors
ANTHROPICS = KINDS | {500: "api_error", 503: "overloaded_error"}


class ServerError(Exception):
    """An answer other than 200 that no module below knows of.

    code: OpenAI's, if it has one for it. headers: further ones of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers or {}


def server_error(error: BaseException) -> ServerError:
    """What to answer. Of what is nobody's fault but ours the text stays here."""
    if isinstance(error, ServerError):
        return error
    if isinstance(error, RequestError):
        code = "context_length_exceeded" if isinstance(error, ContextLengthError) else None
        return ServerError(400, str(error), error.param, code)
    if isinstance(error, QueueFullError):
        return ServerError(429, str(error), code="queue_full", headers={"retry-after": "1"})
    if isinstance(error, EngineClosed):
        return ServerError(503, "the server is shutting down; try again elsewhere")
    return ServerError(500, "the server has failed on this request; its log says why")


def error_body(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of an answer that is none."""
    return {"error": {"message": message, "type": KINDS.get(status, KINDS[400]), "param": param, "code": code}}


def message_error(message: str, status: int, request_id: str) -> dict[str, Any]:
    """The same in Anthropic's form."""
    kind = ANTHROPICS.get(status, ANTHROPICS[400])
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}
