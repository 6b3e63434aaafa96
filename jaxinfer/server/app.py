"""The routes, as an ASGI application."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp

from jaxinfer.openai.answers import Json
from jaxinfer.server import adapters, blocks, chat, completions, operations, pages, pooling, tokens
from jaxinfer.server.body import read_json
from jaxinfer.server.guard import Guard
from jaxinfer.server.service import Service

Reads = Callable[[Service, Request], Awaitable[Response]]
Takes = Callable[[Service, Request, Json], Awaitable[Response]]

GET: dict[str, Reads] = {
    "/": pages.index,
    "/page/{name}": pages.part,
    "/health": operations.health,
    "/ready": operations.ready,
    "/ping": operations.health,
    "/version": operations.version,
    "/load": operations.load,
    "/metrics": operations.metrics,
    "/info": pooling.tei_info,
    "/v1/models": operations.models,
    "/v1/models/{name:path}": operations.model,
}
POST: dict[str, Takes] = {
    "/v1/completions": completions.completions,
    "/v1/chat/completions": chat.chat_completions,
    "/v1/responses": blocks.responses,
    "/v1/messages": blocks.messages,
    "/v1/messages/count_tokens": blocks.count_tokens,
    "/v1/embeddings": pooling.embeddings,
    "/classify": pooling.classify,
    "/score": pooling.score,
    "/v1/score": pooling.score,
    "/rerank": pooling.rerank,
    "/v1/rerank": pooling.rerank,
    "/v2/rerank": pooling.rerank,
    "/pooling": pooling.pooling,
    "/embed": pooling.tei_embed,
    "/predict": pooling.tei_predict,
    "/v1/load_lora_adapter": adapters.load_adapter,
    "/v1/unload_lora_adapter": adapters.unload_adapter,
    "/tokenize": tokens.tokenize,
    "/detokenize": tokens.detokenize,
}


def make_app(service: Service) -> ASGIApp:
    """All of it."""
    routes = [Route(path, _reads(service, handler), methods=["GET"]) for path, handler in GET.items()]
    routes += [Route(path, _takes(service, handler), methods=["POST"]) for path, handler in POST.items()]
    return Guard(Router(routes, redirect_slashes=False), service)


def _reads(service: Service, handler: Reads) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        return await handler(service, request)

    return endpoint


def _takes(service: Service, handler: Takes) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        return await handler(service, request, await read_json(request, service.config.max_body_bytes))

    return endpoint
