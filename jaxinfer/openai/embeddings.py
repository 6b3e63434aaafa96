"""Bodies of /v1/embeddings and /classify, and their answers."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxinfer.engine.outputs import ClassificationRequestOutput, EmbeddingRequestOutput
from jaxinfer.openai.answers import Json
from jaxinfer.openai.fields import Fields, prompts
from jaxinfer.openai.requests import LABELS


@dataclass(frozen=True)
class PoolingRequest:
    """texts: each is text or token ids. options: arguments of LLM.embed or LLM.classify. base64: vectors come so."""

    texts: list[str | list[int]]
    options: dict[str, Any]
    base64: bool = False


def embedding_request(body: Any) -> PoolingRequest:
    """Raises RequestError."""
    fields = Fields(body)
    form = fields.choice("encoding_format", ("float", "base64"), "float")
    given = ("dimensions", "normalize", "prompt_name", "prompt")
    options = {name: fields.take(name) for name in given if name in fields}
    return _request(fields, options, form == "base64")


def classify_request(body: Any) -> PoolingRequest:
    """Raises RequestError."""
    fields = Fields(body)
    options = {"use_activation": fields.flag("use_activation", True)}
    return _request(fields, options, False)


def _request(fields: Fields, options: dict[str, Any], encoded: bool) -> PoolingRequest:
    texts = prompts("input", fields.take("input"))
    keep = fields.integer("truncate_prompt_tokens", -1, 2**31 - 1)
    fields.skip((*LABELS, "request_id"))
    fields.end()
    return PoolingRequest(texts, options | {"truncate_prompt_tokens": keep}, encoded)


def embeddings_body(outputs: Sequence[EmbeddingRequestOutput], model: str, encoded: bool) -> Json:
    """In base64 a vector is little-endian float32."""
    data = []
    for i, output in enumerate(outputs):
        vector = output.outputs.embedding
        value = base64.b64encode(vector.astype("<f4").tobytes()).decode() if encoded else vector.tolist()
        data.append({"object": "embedding", "index": i, "embedding": value})
    return {"object": "list", "data": data, "model": model, "usage": _usage(outputs)}


def classify_body(outputs: Sequence[ClassificationRequestOutput], model: str, name: str, created: int) -> Json:
    """As vLLM has it."""
    data = [
        {
            "index": i,
            "label": output.outputs.label,
            "probs": np.asarray(output.outputs.probs).tolist(),
            "num_classes": output.outputs.num_classes,
        }
        for i, output in enumerate(outputs)
    ]
    head = {"id": f"classify-{name}", "object": "list", "created": created, "model": model}
    return head | {"data": data, "usage": _usage(outputs)}


def _usage(outputs: Sequence[EmbeddingRequestOutput] | Sequence[ClassificationRequestOutput]) -> Json:
    tokens = sum(len(output.prompt_token_ids) for output in outputs)
    return {"prompt_tokens": tokens, "total_tokens": tokens}
