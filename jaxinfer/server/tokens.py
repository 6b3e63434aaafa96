"""/tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from jaxinfer.errors import RequestError
from jaxinfer.models.tasks import GENERATE
from jaxinfer.openai.answers import Json
from jaxinfer.openai.fields import Fields, is_number, prompts
from jaxinfer.openai.requests import chat_request
from jaxinfer.sampling.params import SamplingParams
from jaxinfer.server.answers import json_answer
from jaxinfer.server.service import Service


async def tokenize(service: Service, request: Request, body: Json) -> Response:
    """The ids of a prompt, or of a conversation."""
    service.model(body.get("model"))
    tokenizer = service.llm.tokenizer
    fields = Fields(body)
    strings = fields.flag("return_token_strs")
    if "messages" in fields:
        service.model(body.get("model"), GENERATE)
        asked = {name: value for name, value in body.items() if name != "return_token_strs"}
        ids = await service.prepared(lambda: service.formats.prepare(chat_request(asked, SamplingParams())).ids)
    else:
        text, special = fields.text("prompt"), fields.flag("add_special_tokens", True)
        fields.skip(("model",))
        fields.end()
        if text is None:
            raise RequestError("prompt must be text: give that, or messages", "prompt")
        prompt = text
        ids = await service.prepared(lambda: service.encode(prompt, special))
    limit = service.max_model_len
    shown = [tokenizer.token_text(token) for token in ids] if strings else None
    return json_answer({"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": shown})


async def detokenize(service: Service, request: Request, body: Json) -> Response:
    """The text of ids."""
    service.model(body.get("model"))
    fields = Fields(body)
    tokens = fields.take("tokens")
    fields.skip(("model",))
    fields.end()
    if not isinstance(tokens, list) or not all(map(is_number, tokens)):
        raise RequestError("tokens must be a list of token ids", "tokens")
    ids = prompts("tokens", tokens)[0] if tokens else []
    assert isinstance(ids, list)
    service.llm.tokenizer.require("text", "give the server a model that has one", "tokens")
    return json_answer({"prompt": await service.prepared(lambda: service.llm.tokenizer.decode(ids, False))})
