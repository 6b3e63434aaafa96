"""Routes of models that make vectors, classes and scores of whole texts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from jaxinfer import __version__
from jaxinfer.errors import RequestError
from jaxinfer.models.tasks import CLASSIFY, EMBED
from jaxinfer.openai import tei
from jaxinfer.openai.answers import Json
from jaxinfer.openai.errors import ServerError
from jaxinfer.openai.fields import Fields
from jaxinfer.openai.pooling import (
    EmbeddingRequest,
    PoolingRequest,
    ScoringRequest,
    classified,
    classify_request,
    embedding_request,
    embeddings_body,
    encoding_request,
    in_base64,
    list_body,
    ranking_body,
    ranking_request,
    score_request,
)
from jaxinfer.server.answers import json_answer, while_connected
from jaxinfer.server.service import Service

MOST_TEXTS = 2048  # of a request, as OpenAI has it
Asked = TypeVar("Asked", bound=PoolingRequest)


async def embeddings(service: Service, request: Request, body: Json) -> Response:
    """The vectors of texts."""
    asked, model = await _asked(service, body, embedding_request, EMBED)
    outputs = await _vectors(service, request, asked)

    def answer() -> Response:
        vectors = [_encoded(output.outputs.embedding, asked.base64) for output in outputs]
        return json_answer(embeddings_body(vectors, _tokens(outputs), model))

    return await service.prepared(answer)


async def classify(service: Service, request: Request, body: Json) -> Response:
    """The classes of texts."""
    asked, model = await _asked(service, body, classify_request, CLASSIFY)
    outputs = await _classes(service, request, asked)
    data = [classified(i, output.outputs) for i, output in enumerate(outputs)]
    return _list_answer(request, "classify", model, data, outputs)


async def score(service: Service, request: Request, body: Json) -> Response:
    """How well documents answer queries."""
    asked, model = await _asked(service, body, score_request, EMBED, CLASSIFY)
    outputs = await _scores(service, request, asked)
    data = [{"index": i, "object": "score", "score": output.outputs.score} for i, output in enumerate(outputs)]
    return _list_answer(request, "score", model, data, outputs)


async def rerank(service: Service, request: Request, body: Json) -> Response:
    """The documents that answer a query best."""
    if "texts" in body:
        asked, _ = await _asked(service, body, tei.rank_request, EMBED, CLASSIFY)
        outputs = await _scores(service, request, asked)
        return json_answer(tei.ranking(asked, [output.outputs.score for output in outputs]))
    asked, model = await _asked(service, body, ranking_request, EMBED, CLASSIFY)
    outputs = await _scores(service, request, asked)
    scores = [output.outputs.score for output in outputs]
    return json_answer(ranking_body(asked, scores, request.state.name, model, _tokens(outputs)))


async def pooling(service: Service, request: Request, body: Json) -> Response:
    """What the model makes of texts, or of each of their tokens."""
    asked, model = await _asked(service, body, encoding_request, EMBED, CLASSIFY)
    llm = service.llm
    outputs = await _done(
        service,
        request,
        lambda: service.prepared(
            lambda: llm.encode(asked.texts, asked.params, pooling_task=asked.task, use_tqdm=False)
        ),
    )

    def answer() -> Response:
        numbers = [_encoded(output.outputs.data, asked.base64) for output in outputs]
        data = [{"index": i, "object": "pooling", "data": entry} for i, entry in enumerate(numbers)]
        return _list_answer(request, "pool", model, data, outputs)

    return await service.prepared(answer)


async def tei_embed(service: Service, request: Request, body: Json) -> Response:
    """The vectors of texts, as text-embeddings-inference gives them."""
    asked, _ = await _asked(service, body, tei.embed_request, EMBED)
    outputs = await _vectors(service, request, asked)
    return await service.prepared(lambda: json_answer([output.outputs.embedding.tolist() for output in outputs]))


async def tei_predict(service: Service, request: Request, body: Json) -> Response:
    """The classes of texts, likewise."""
    asked, _ = await _asked(service, body, tei.predict_request, CLASSIFY)
    outputs = await _classes(service, request, asked)
    answers = [tei.predictions(output, service.engine.pooling.labels) for output in outputs]
    return json_answer(answers[0] if asked.alone else answers)


async def tei_info(service: Service, request: Request) -> Response:
    """What is served, likewise."""
    task = service.llm.task
    return json_answer(
        {
            "model_id": service.config.names[0],
            "model_dtype": str(service.llm.dtype),
            "model_type": tei.model_type(task, service.engine.pooling.labels if task == CLASSIFY else ()),
            "max_input_length": service.max_model_len,
            "max_concurrent_requests": service.config.max_queued,
            "max_client_batch_size": MOST_TEXTS,
            "version": __version__,
        }
    )


async def _asked(service: Service, body: Json, read: Callable[[Fields], Asked], *tasks: str) -> tuple[Asked, str]:
    """What is asked for, and the name of the model. Raises what `Service.model` and `read` raise."""
    model = service.model(body.get("model"), *tasks)

    def checked() -> Asked:
        asked = read(Fields(body))
        if len(asked.texts) > MOST_TEXTS:
            raise RequestError(f"{len(asked.texts)} texts are given: at most {MOST_TEXTS} are taken at once", "input")
        for text in asked.texts:
            for part in text if isinstance(text, tuple) else (text,):
                if isinstance(part, str):
                    service.check_length(part)
        return asked

    return await service.prepared(checked), model


async def _vectors(service: Service, request: Request, asked: EmbeddingRequest) -> list[Any]:
    engine = service.engine
    ask = engine.pooling.embedding(asked.params, asked.truncate, asked.prompt_name, asked.prompt)
    return await _done(service, request, lambda: engine.answers(asked.texts, ask))


async def _classes(service: Service, request: Request, asked: PoolingRequest) -> list[Any]:
    engine = service.engine
    ask = engine.pooling.classifying(asked.params, asked.truncate)
    return await _done(service, request, lambda: engine.answers(asked.texts, ask))


async def _scores(service: Service, request: Request, asked: ScoringRequest) -> list[Any]:
    engine = service.engine
    ask = engine.pooling.scoring(asked.params, asked.truncate, None)
    queries, documents = asked.texts[: asked.queries], asked.texts[asked.queries :]
    return await _done(service, request, lambda: engine.scores(queries, documents, ask))


async def _done(service: Service, request: Request, work: Callable[[], Awaitable[list[Any]]]) -> list[Any]:
    """The outputs. Raises ServerError for one that failed."""
    start = time.perf_counter()
    with service.admitted(request.state.key):
        if service.active > service.config.max_queued:
            raise ServerError(429, "too many requests are waiting; try later", code="queue_full")
        outputs = await while_connected(request.receive, _watched(service, work))
    for output in outputs:
        if output.error is not None:
            raise ServerError(500, output.error)
        service.metrics.pooled(len(output.prompt_token_ids), time.perf_counter() - start)
    if service.tracing is not None:
        model, seconds = service.config.names[0], time.perf_counter() - start
        service.tracing.add({"gen_ai.response.model": model, "gen_ai.latency.e2e": seconds})
        service.tracing.add({"gen_ai.usage.prompt_tokens": _tokens(outputs)})
    return outputs


async def _watched(service: Service, work: Callable[[], Awaitable[list[Any]]]) -> list[Any]:
    limit = service.config.request_seconds
    try:
        async with asyncio.timeout(limit):
            with service.watched():
                return await work()
    except TimeoutError:
        raise ServerError(503, f"the request took longer than {limit:g} s, the limit here; ask for less") from None


def _list_answer(request: Request, kind: str, model: str, data: list[Json], outputs: Sequence[Any]) -> Response:
    return json_answer(list_body(kind, request.state.name, int(time.time()), model, data, _tokens(outputs)))


def _encoded(numbers: np.ndarray, in_text: bool) -> Any:
    return in_base64(numbers) if in_text else numbers.tolist()


def _tokens(outputs: Sequence[Any]) -> int:
    return sum(len(output.prompt_token_ids) for output in outputs)
