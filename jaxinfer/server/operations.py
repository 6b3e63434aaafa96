"""What is asked of a server and not of its model."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from jaxinfer import __version__
from jaxinfer.openai.answers import Json
from jaxinfer.openai.errors import ServerError
from jaxinfer.server.answers import json_answer
from jaxinfer.server.service import Service


async def health(service: Service, request: Request) -> Response:
    """Whether it is alive."""
    if service.state == "failed" or service.closed:
        raise ServerError(503, "the server has failed")
    return Response()


async def ready(service: Service, request: Request) -> Response:
    """Whether it takes requests."""
    if service.state != "ready":
        raise ServerError(503, f"the server is {service.state}")
    return await health(service, request)


async def version(service: Service, request: Request) -> Response:
    return json_answer({"version": __version__})


async def load(service: Service, request: Request) -> Response:
    """How many requests it has."""
    return json_answer({"server_load": service.active})


async def metrics(service: Service, request: Request) -> Response:
    text = service.metrics.text(service.config.names[0], service.llm.stats)
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")


async def models(service: Service, request: Request) -> Response:
    names = (*service.config.names, *service.adapters)
    return json_answer({"object": "list", "data": [_model(service, name) for name in names]})


async def model(service: Service, request: Request) -> Response:
    return json_answer(_model(service, service.model(request.path_params["name"])))


def _model(service: Service, name: str) -> Json:
    """root: where it is from, as far as that is anybody's business. parent: of an adapter, the model."""
    own, base = service.adapters.get(name), service.config.names[0]
    body = {"id": name, "object": "model", "created": service.created, "owned_by": "jaxinfer"}
    body |= {"root": name if own is None else Path(own.folder).name, "parent": None if own is None else base}
    return body | {"max_model_len": service.max_model_len}
