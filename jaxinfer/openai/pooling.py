"""Bodies of routes for models that make vectors, classes and scores of whole texts, and their answers.

Format: /v1/embeddings is OpenAI's, /classify, /pooling and /score are vLLM's, /rerank is that of Jina and Cohere.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxinfer.engine.outputs import ClassificationOutput, RerankResult
from jaxinfer.errors import RequestError
from jaxinfer.openai.answers import Json
from jaxinfer.openai.fields import Fields, kind, texts
from jaxinfer.openai.requests import LABELS
from jaxinfer.tasks.params import PoolingParams

# What vLLM has called the two sides of a score.
SIDES = (("text_1", "text_2"), ("queries", "documents"), ("data_1", "data_2"))
TASKS = ("embed", "classify", "token_embed", "token_classify")


@dataclass(frozen=True, kw_only=True)
class PoolingRequest:
    """texts: each is text, token ids, or a pair of texts. params: what is made of them. truncate: those that are too
    long. base64: numbers come so."""

    texts: list[Any]
    params: PoolingParams
    truncate: bool = False
    base64: bool = False


@dataclass(frozen=True, kw_only=True)
class EmbeddingRequest(PoolingRequest):
    """prompt_name, prompt: see `LLM.embed`."""

    prompt_name: str | None
    prompt: str | None


@dataclass(frozen=True, kw_only=True)
class EncodingRequest(PoolingRequest):
    """task: one of TASKS, or None: what the model is for."""

    task: str | None


@dataclass(frozen=True, kw_only=True)
class ScoringRequest(PoolingRequest):
    """queries: how many of the texts are; documents come after them: one for each, or any number for one."""

    queries: int


@dataclass(frozen=True, kw_only=True)
class RankingRequest(ScoringRequest):
    """documents: as they were given. top_n: how many are wanted; None: all. shown: whether the answer has the
    documents, too."""

    documents: list[Any]
    top_n: int | None
    shown: bool


def embedding_request(fields: Fields) -> EmbeddingRequest:
    """Of vectors. Raises RequestError, as the others do."""
    name, before = fields.text("prompt_name"), fields.text("prompt")
    encoded = _encoded(fields)
    given = _given(fields, fields.prompts("input"), "dimensions", "normalize", "use_activation")
    return EmbeddingRequest(**given, base64=encoded, prompt_name=name, prompt=before)


def classify_request(fields: Fields) -> PoolingRequest:
    """Of classes."""
    return PoolingRequest(**_given(fields, fields.prompts("input"), "use_activation"))


def encoding_request(fields: Fields) -> EncodingRequest:
    """Of whatever the model makes."""
    task, encoded = fields.text("task"), _encoded(fields)
    if task not in (None, *TASKS):
        raise fields.error("task", f"must be one of {', '.join(TASKS)}, and is {task!r:.40}")
    names = ("dimensions", "normalize", "use_activation", "step_tag_id", "returned_token_ids")
    return EncodingRequest(**_given(fields, fields.prompts("input"), *names), base64=encoded, task=task)


def score_request(fields: Fields) -> ScoringRequest:
    """Of scores."""
    first, second = next((names for names in SIDES if names[0] in fields), SIDES[0])
    queries, documents = fields.texts(first), fields.texts(second)
    from jaxinfer.tasks.pairs import paired  # JAX comes with it

    paired(queries, documents)  # or it is refused
    return ScoringRequest(**_given(fields, [*queries, *documents], "use_activation"), queries=len(queries))


def ranking_request(fields: Fields) -> RankingRequest:
    """Of documents, the best first."""
    query, documents = fields.text("query"), fields.take("documents")
    if not query:
        raise RequestError("query must be text, and is empty", "query")
    if not isinstance(documents, list) or not documents:
        raise RequestError(f"documents must be a list of texts, and is {kind(documents)}", "documents")
    listed = [entry.get("text") if isinstance(entry, dict) else entry for entry in documents]
    top, shown = fields.integer("top_n", 1, 2**31 - 1), fields.flag("return_documents", True)
    given = _given(fields, [query, *texts("documents", listed)], "use_activation")
    return RankingRequest(**given, queries=1, documents=documents, top_n=top, shown=shown)


def _given(fields: Fields, texts: list[Any], *names: str) -> dict[str, Any]:
    """Takes all that is left, with these parameters; refuses what is nobody's."""
    fields.only("add_special_tokens", True)
    params = PoolingParams(**{name: fields.take(name) for name in (*names, "truncate_prompt_tokens") if name in fields})
    fields.skip((*LABELS, "request_id"))
    fields.end()
    return {"texts": texts, "params": params}


def _encoded(fields: Fields) -> bool:
    return fields.choice("encoding_format", ("float", "base64"), "float") == "base64"


def in_base64(numbers: np.ndarray) -> str:
    """As float32, the least byte of each first."""
    return base64.b64encode(numbers.astype("<f4").tobytes()).decode()


def embeddings_body(vectors: Sequence[Any], tokens: int, model: str) -> Json:
    """vectors: as JSON has them, or in base64. tokens: of all texts."""
    data = [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(vectors)]
    return {"object": "list", "data": data, "model": model, "usage": usage(tokens)}


def classified(index: int, output: ClassificationOutput) -> Json:
    """The classes of a text."""
    probs = output.probs.tolist()
    return {"index": index, "label": output.label, "probs": probs, "num_classes": output.num_classes}


def list_body(kind: str, name: str, created: int, model: str, data: list[Json], tokens: int) -> Json:
    """What vLLM answers where OpenAI has nothing. kind: before the name, in the answer's id."""
    head = {"id": f"{kind}-{name}", "object": "list", "created": created, "model": model}
    return head | {"data": data, "usage": usage(tokens)}


def ranking_body(asked: RankingRequest, scores: list[float], name: str, model: str, tokens: int) -> Json:
    """The best documents, the best first."""
    from jaxinfer.tasks.pairs import ranked  # JAX comes with it

    results = [_ranked(entry, asked.shown) for entry in ranked(asked.documents, scores, asked.top_n)]
    return {"id": f"rerank-{name}", "model": model, "usage": {"total_tokens": tokens}, "results": results}


def _ranked(entry: RerankResult, shown: bool) -> Json:
    result: Json = {"index": entry.index, "relevance_score": entry.relevance_score}
    if shown:
        result["document"] = entry.document if isinstance(entry.document, dict) else {"text": entry.document}
    return result


def usage(tokens: int) -> Json:
    """Of texts, of which nothing is generated."""
    return {"prompt_tokens": tokens, "total_tokens": tokens}
