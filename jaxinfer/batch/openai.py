"""OpenAI's form for what comes back: one line per batch line. Format: see `openai_request`.

Everything in it follows from the row and its output, so that a job that was killed and started again writes the same:
ids are digests of the row's place and custom_id, `created` is 0, and there are no times and no counts of cached tokens.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxinfer.batch.row import Row
from jaxinfer.batch.values import numbers
from jaxinfer.engine.outputs import CompletionOutput, Logprob, RequestOutput

LEAST = -9999.0  # what OpenAI writes for a logprob that JSON has no number for


def response_line(row: Row, output: RequestOutput | None, *, model: str) -> dict[str, Any]:
    """The line of an OpenAI row (`row.openai`). output None: only if the row has an error. model: the name of what ran,
    whatever the line called it. Of a row that failed, `response` has status_code 400 and says why."""
    error = row.error if row.error is not None else output.error if output is not None else "no output"
    if error is not None or output is None or row.ask is None or row.ask.params is None:
        status = 400
        body: dict[str, Any] = {
            "error": {"message": error, "type": "invalid_request_error", "param": None, "code": None}
        }
    else:
        status = 200
        chat = row.ask.messages is not None
        body = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{_digest(row)}",
            "object": "chat.completion" if chat else "text_completion",
            "created": 0,
            "model": model,
            "choices": [
                (_message if chat else _text)(choice, row.ask.params.logprobs or 0) for choice in output.outputs
            ],
            "usage": _usage(output),
        }
    return _line(row, status, body)


def embeddings_line(row: Row, vectors: Sequence[np.ndarray], tokens: int, *, model: str) -> dict[str, Any]:
    """The line of a row of embeddings. tokens: of all its texts."""
    assert row.ask is not None
    encode = _base64 if row.ask.base64 else numbers
    data = [{"object": "embedding", "index": i, "embedding": encode(vector)} for i, vector in enumerate(vectors)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return _line(row, 200, {"object": "list", "data": data, "model": model, "usage": usage})


def _base64(vector: np.ndarray) -> str:
    """Of float32, the least byte of each first."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def _line(row: Row, status: int, body: dict[str, Any]) -> dict[str, Any]:
    digest = _digest(row)
    response = {"status_code": status, "request_id": f"req_{digest}", "body": body}
    return {"id": f"batch_req_{digest}", "custom_id": row.custom_id, "response": response, "error": None}


def _digest(row: Row) -> str:
    return hashlib.blake2b(f"{row.index}:{row.custom_id}".encode(), digest_size=12).hexdigest()


def _usage(output: RequestOutput) -> dict[str, int]:
    prompt, completion = len(output.prompt_token_ids), sum(len(choice.token_ids) for choice in output.outputs)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _message(choice: CompletionOutput, wanted: int) -> dict[str, Any]:
    logprobs = None
    if choice.logprobs is not None:
        content = [
            _entry(sampled) | {"top_logprobs": [_entry(x) for x in ranked if x.rank <= wanted][:wanted]}
            for sampled, ranked in _steps(choice)
        ]
        logprobs = {"content": content, "refusal": None}
    message = {"role": "assistant", "content": choice.text, "refusal": None}
    return {"index": choice.index, "message": message, "logprobs": logprobs, "finish_reason": choice.finish_reason}


def _text(choice: CompletionOutput, _: int) -> dict[str, Any]:
    """top_logprobs has the sampled token too. text_offset is null: a token's own text may be without its space."""
    logprobs: dict[str, Any] | None = None
    if choice.logprobs is not None:
        steps = list(_steps(choice))
        logprobs = {
            "tokens": [sampled.decoded_token for sampled, _ in steps],
            "token_logprobs": [_finite(sampled) for sampled, _ in steps],
            # Several tokens can have the same text: the likeliest one stays.
            "top_logprobs": [{x.decoded_token: _finite(x) for x in reversed(ranked)} for _, ranked in steps],
            "text_offset": None,
        }
    return {"index": choice.index, "text": choice.text, "logprobs": logprobs, "finish_reason": choice.finish_reason}


def _steps(choice: CompletionOutput) -> Iterator[tuple[Logprob, list[Logprob]]]:
    """Of each token: itself, and all that are reported, itself too, likeliest first."""
    for token, step in zip(choice.token_ids, choice.logprobs or (), strict=True):
        yield step[token], sorted(step.values(), key=lambda x: x.rank)


def _entry(logprob: Logprob) -> dict[str, Any]:
    # Where a token is part of a character, its own bytes are not known here.
    own = None if "\ufffd" in logprob.decoded_token else list(logprob.decoded_token.encode())
    return {"token": logprob.decoded_token, "logprob": _finite(logprob), "bytes": own}


def _finite(logprob: Logprob) -> float:
    return max(logprob.logprob, LEAST)
