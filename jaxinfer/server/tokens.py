"""/tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from jaxinfer.models.tasks import GENERATE
from jaxinfer.openai.answers import Json
from jaxinfer.openai.fields import Fields
from jaxinfer.openai.tokens import detokenize_request, tokenize_request
from jaxinfer.server.answers import json_answer
from jaxinfer.server.service import Service


async def tokenize(service: Service, request: Request, body: Json) -> Response:
    """The ids of a prompt, or of a conversation."""
    service.model(body.get("model"), *([GENERATE] if body.get("messages") is not None else []))
    tokenizer, limit = service.llm.tokenizer, service.max_model_len

    def answer() -> Response:
        request = tokenize_request(Fields(body))
        asked = request.asked
        if isinstance(asked, str):
            ids = service.encode(asked, request.add_special_tokens)
        else:
            ids = service.formats.prepare(asked).ids
        shown = [tokenizer.token_text(token) for token in ids] if request.strings else None
        return json_answer({"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": shown})

    return await service.prepared(answer)


async def detokenize(service: Service, request: Request, body: Json) -> Response:
    """The text of ids."""
    service.model(body.get("model"))
    ids = detokenize_request(Fields(body))
    service.llm.tokenizer.require("text", "give the server a model that has one", "tokens")
    return json_answer({"prompt": await service.prepared(lambda: service.llm.tokenizer.decode(ids, False))})
