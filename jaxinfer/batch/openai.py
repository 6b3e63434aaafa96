"""OpenAI's form for what comes back: one line per batch line. Format: see `openai_request`.

Everything in it follows from the row and its output, so that a job that was killed and started again writes the same:
ids are digests of the row's place and custom_id, `created` is 0, and there are no times and no counts of cached tokens.
"""

from __future__ import annotations

import hashlib
from typing import Any

from jaxinfer.batch.row import Row
from jaxinfer.engine.outputs import RequestOutput
from jaxinfer.openai.answers import Envelope, chat_choice, text_choice, usage
from jaxinfer.openai.errors import error_body
from jaxinfer.text.scanner import Message


def response_line(row: Row, output: RequestOutput | None, *, model: str) -> dict[str, Any]:
    """The line of an OpenAI row (`row.openai`). output None: only if the row has an error. model: the name of what ran,
    whatever the line called it. Of a row that failed, `response` has status_code 400 and says why."""
    digest = hashlib.blake2b(f"{row.index}:{row.custom_id}".encode(), digest_size=12).hexdigest()
    error = row.error if row.error is not None else output.error if output is not None else "no output"
    if error is not None or output is None or row.ask is None or row.ask.params is None:
        status, body = 400, error_body(error or "no output", 400)
    else:
        status, chat, wanted = 200, row.ask.messages is not None, row.ask.params.logprobs or 0
        counts = usage(len(output.prompt_token_ids), sum(len(choice.token_ids) for choice in output.outputs))
        envelope = Envelope(f"{'chatcmpl' if chat else 'cmpl'}-{digest}", 0, model)
        choices = [
            chat_choice(choice, Message(choice.text), wanted) if chat else text_choice(choice)
            for choice in output.outputs
        ]
        body = envelope.around("chat.completion" if chat else "text_completion", choices, counts)
    response = {"status_code": status, "request_id": f"req_{digest}", "body": body}
    return {"id": f"batch_req_{digest}", "custom_id": row.custom_id, "response": response, "error": None}
