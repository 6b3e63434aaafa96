"""/v1/embeddings and /classify: models that make vectors or classes of whole texts."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response

from jaxinfer.errors import RequestError, UnsupportedError
from jaxinfer.llm import CAN
from jaxinfer.models.tasks import CLASSIFY, EMBED
from jaxinfer.openai.answers import Json
from jaxinfer.openai.embeddings import (
    PoolingRequest,
    classify_body,
    classify_request,
    embedding_request,
    embeddings_body,
)
from jaxinfer.openai.errors import ServerError
from jaxinfer.server.answers import json_answer, while_connected
from jaxinfer.server.service import Service

MOST_TEXTS = 2048  # of a request, as OpenAI has it
Result = TypeVar("Result")


async def embeddings(service: Service, request: Request, body: Json) -> Response:
    """The vectors of texts."""
    model = service.model(body.get("model"))
    _check_task(service, EMBED)
    asked = embedding_request(body)
    llm = service.llm
    work = _work(asked, lambda: llm.embed(asked.texts, use_tqdm=False, **asked.options))
    outputs = await _done(service, request, work)
    return json_answer(await service.prepared(lambda: embeddings_body(outputs, model, asked.base64)))


async def classify(service: Service, request: Request, body: Json) -> Response:
    """The classes of texts."""
    model = service.model(body.get("model"))
    _check_task(service, CLASSIFY)
    asked = classify_request(body)
    llm = service.llm
    work = _work(asked, lambda: llm.classify(asked.texts, use_tqdm=False, **asked.options))
    outputs = await _done(service, request, work)
    return json_answer(classify_body(outputs, model, request.state.name, int(time.time())))


def _check_task(service: Service, task: str) -> None:
    if service.llm.task != task:
        raise UnsupportedError(f"this model can't do that: {CAN[service.llm.task]}", "model")


def _work(asked: PoolingRequest, run: Callable[[], Result]) -> Callable[[], Result]:
    if len(asked.texts) > MOST_TEXTS:
        raise RequestError(f"input has {len(asked.texts)} texts: at most {MOST_TEXTS} are taken", "input")

    def work() -> Result:
        outputs = run()
        for output in outputs:  # type: ignore[attr-defined]
            if output.error is not None:
                raise ServerError(500, output.error)
        return outputs

    return work


async def _done(service: Service, request: Request, work: Callable[[], Result]) -> Result:
    with service.admitted(request.state.key):
        if service.active > service.config.max_queued:
            raise ServerError(429, "too many requests are waiting; try later", code="queue_full")
        return await while_connected(request.receive, service.prepared(work))
