"""/openapi.json: the routes, what they take, and every status that they answer.

Format: https://spec.openapis.org/oas/v3.1.0
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from jaxinfer import __version__
from jaxinfer.openai import tei
from jaxinfer.openai.answers import Json
from jaxinfer.openai.anthropic import messages_request
from jaxinfer.openai.errors import error_body, message_error
from jaxinfer.openai.fields import Fields
from jaxinfer.openai.pooling import (
    SIDES,
    classify_request,
    embedding_request,
    encoding_request,
    ranking_request,
    score_request,
)
from jaxinfer.openai.requests import chat_request, completion_request
from jaxinfer.openai.responses import response_request
from jaxinfer.openai.schema import body_schema
from jaxinfer.openai.tokens import detokenize_request, tokenize_request
from jaxinfer.sampling.params import SamplingParams
from jaxinfer.server.adapters import read_loading, read_unloading
from jaxinfer.server.guard import PUBLIC

STATUSES = {
    400: "something is wrong with the request; the error says what, and `param` where",
    401: "there is no API key, or it is none of the server's",
    403: "`Host` is no name that the server goes by, or the server does not do this",
    404: "there is no such model, or file",
    408: "the body took too long to come",
    413: "the body is too large",
    415: "the body is not said to be JSON, or it is compressed",
    429: "too many requests wait",
    500: "the server has failed on this request",
    503: "the server is shutting down, has failed, or has too many connections",
}
OF_ALL = {400, 401, 403, 500, 503}
OF_BODIES = OF_ALL | {404, 408, 413, 415, 429}
# Of what is no JSON; None: there is no body.
KINDS = {
    "/": "text/html",
    "/page/{name}": "*/*",
    "/metrics": "text/plain",
    "/health": None,
    "/ready": None,
    "/ping": None,
    "/v1/load_lora_adapter": "text/plain",
    "/v1/unload_lora_adapter": "text/plain",
}

DEFAULTS = SamplingParams()
SAID = {"messages": [{"role": "user", "content": "What is 27 + 45?"}]}
STREAMED = {"stream": True, "stream_options": {}}
FORM = {"type": "json_schema", "schema": {"type": "object"}}
MESSAGES: list[Json] = [
    SAID,
    SAID | {"output_format": FORM, "tool_choice": {"type": "none"}},
    SAID | {"output_config": {"format": FORM}, "thinking": {"type": "disabled"}},
]
PAIR = ["Where is Oslo?", "In Norway."]


def _rerank(fields: Fields) -> Any:
    return tei.rank_request(fields) if "texts" in fields else ranking_request(fields)


Body = tuple[Callable[[Fields], Any], list[Json]]
RERANK: Body = (_rerank, [{"query": PAIR[0], "documents": PAIR[1:]}, {"query": PAIR[0], "texts": PAIR[1:]}])
SCORE: Body = (score_request, [{one: PAIR[0], other: PAIR[1:]} for one, other in SIDES])
# How each body is read, and examples of it, as `body_schema` takes them.
BODIES: dict[str, Body] = {
    "/v1/completions": (
        partial(completion_request, defaults=DEFAULTS),
        [{"prompt": "The sky is"}, {"prompt": "The sky is"} | STREAMED],
    ),
    "/v1/chat/completions": (partial(chat_request, defaults=DEFAULTS, own_template=True), [SAID, SAID | STREAMED]),
    "/v1/responses": (
        partial(response_request, defaults=DEFAULTS),
        [
            {"input": "What is 27 + 45?"},
            {"input": "What is 27 + 45?", "reasoning": {}, "text": {"format": FORM}} | STREAMED,
        ],
    ),
    "/v1/messages": (
        partial(messages_request, defaults=DEFAULTS),
        [asked | {"max_tokens": 64} for asked in MESSAGES],
    ),
    "/v1/messages/count_tokens": (partial(messages_request, defaults=DEFAULTS, counting=True), MESSAGES),
    "/v1/embeddings": (embedding_request, [{"input": PAIR}]),
    "/classify": (classify_request, [{"input": PAIR}]),
    "/pooling": (encoding_request, [{"input": PAIR}]),
    "/score": SCORE,
    "/v1/score": SCORE,
    "/rerank": RERANK,
    "/v1/rerank": RERANK,
    "/v2/rerank": RERANK,
    "/embed": (tei.embed_request, [{"inputs": PAIR}]),
    "/predict": (tei.predict_request, [{"inputs": PAIR[0]}]),
    "/tokenize": (tokenize_request, [{"prompt": "The sky is"}, SAID, SAID | STREAMED]),
    "/v1/load_lora_adapter": (read_loading, [{"lora_name": "brief", "lora_path": "brief-v2"}]),
    "/v1/unload_lora_adapter": (read_unloading, [{"lora_name": "brief"}]),
    "/detokenize": (detokenize_request, [{"tokens": [1, 2]}]),
}


def document(
    get: Mapping[str, Callable[..., Any]], post: Mapping[str, Callable[..., Any]], names: Sequence[str]
) -> Json:
    """get, post: what answers each path. names: that requests may give as the model."""
    paths: dict[str, Json] = {}
    for path, handler in get.items():
        path = path.replace(":path}", "}")
        statuses = OF_ALL - ({401} if path in PUBLIC else set()) | ({404} if "{" in path else set())
        kind = KINDS.get(path, "application/json")
        content: Json = {} if kind is None else {"content": {kind: {}}}
        paths[path] = {"get": _operation(path, handler, {"200": {"description": "the answer"} | content}, statuses)}
    for path, handler in post.items():
        read, examples = BODIES[path]
        schema = body_schema(read, examples)
        if "model" in schema["properties"]:
            schema["properties"]["model"] = {"enum": [*names, None]}
        kinds = [
            KINDS.get(path) or "application/json",
            *(["text/event-stream"] if "stream" in schema["properties"] else []),
        ]
        answer = {"description": "the answer", "content": {kind: {} for kind in kinds}}
        body = {"required": True, "content": {"application/json": {"schema": schema, "example": examples[0]}}}
        paths[path] = {"post": _operation(path, handler, {"200": answer}, OF_BODIES) | {"requestBody": body}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "jaxinfer", "version": __version__},
        "paths": paths,
        "security": [{}, {"bearer": []}, {"key": []}],
        "components": {
            "schemas": {
                "Error": _schema_of(error_body("", 400)),
                "MessageError": _schema_of(message_error("", 400, "")),
            },
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _operation(path: str, handler: Callable[..., Any], answers: Json, statuses: set[int]) -> Json:
    name = "MessageError" if path.startswith("/v1/messages") else "Error"
    error = {"content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}}
    operation: Json = {
        "summary": (handler.__doc__ or "").partition("\n")[0],
        "responses": answers | {str(status): {"description": STATUSES[status]} | error for status in sorted(statuses)},
    }
    if "{name}" in path:
        operation["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
    return operation


def _schema_of(example: Any) -> Json:
    """Of objects with these fields, and text in them."""
    if not isinstance(example, dict):
        return {"type": ["string", "null"] if example is None else "string"}
    properties = {name: _schema_of(value) for name, value in example.items()}
    return {"type": "object", "properties": properties, "required": list(properties)}
