"""OpenAI's form for what comes back: one line per batch line. Format: see `openai_request`.

Everything in it follows from the row and its output, so that a job that was killed and started again writes the same:
ids are digests of the row's place and custom_id, `created` is 0, and there are no times and no counts of cached tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxinfer.batch.row import Row
from jaxinfer.batch.values import numbers
from jaxinfer.engine.outputs import RequestOutput
from jaxinfer.openai.answers import Envelope, chat_choice, text_choice, usage
from jaxinfer.openai.errors import error_body
from jaxinfer.openai.pooling import embeddings_body, in_base64
from jaxinfer.text.scanner import Message


def response_line(row: Row, output: RequestOutput | None, *, model: str) -> dict[str, Any]:
    """The line of an OpenAI row (`row.openai`). output None: only if the row has an error. model: the name of what ran,
    whatever the line called it. Of a row that failed, `response` has status_code 400 and says why."""
    error = row.error if row.error is not None else output.error if output is not None else "no output"
    if error is not None or output is None or row.ask is None or row.ask.params is None:
        status, body = 400, error_body(error or "no output", 400)
    else:
        status, chat, wanted = 200, row.ask.messages is not None, row.ask.params.logprobs or 0
        counts = usage(len(output.prompt_token_ids), sum(len(choice.token_ids) for choice in output.outputs))
        envelope = Envelope(f"{'chatcmpl' if chat else 'cmpl'}-{_digest(row)}", 0, model)
        choices = [
            chat_choice(choice, Message(choice.text), wanted) if chat else text_choice(choice)
            for choice in output.outputs
        ]
        body = envelope.around("chat.completion" if chat else "text_completion", choices, counts)
    return _line(row, status, body)


def embeddings_line(row: Row, vectors: Sequence[np.ndarray], tokens: int, *, model: str) -> dict[str, Any]:
    """The line of a row of embeddings. tokens: of all its texts."""
    assert row.ask is not None
    encode = in_base64 if row.ask.base64 else numbers
    return _line(row, 200, embeddings_body([encode(vector) for vector in vectors], tokens, model))


def _line(row: Row, status: int, body: dict[str, Any]) -> dict[str, Any]:
    digest = _digest(row)
    response = {"status_code": status, "request_id": f"req_{digest}", "body": body}
    return {"id": f"batch_req_{digest}", "custom_id": row.custom_id, "response": response, "error": None}


def _digest(row: Row) -> str:
    return hashlib.blake2b(f"{row.index}:{row.custom_id}".encode(), digest_size=12).hexdigest()
