"""Bodies of the routes of text-embeddings-inference, and their answers.

Format: https://huggingface.github.io/text-embeddings-inference
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxinfer.engine.outputs import ClassificationRequestOutput
from jaxinfer.errors import RequestError
from jaxinfer.models.tasks import CLASSIFY, EMBED
from jaxinfer.openai.answers import Json
from jaxinfer.openai.fields import Fields, texts
from jaxinfer.openai.pooling import EmbeddingRequest, PoolingRequest, RankingRequest
from jaxinfer.tasks.pairs import ranked
from jaxinfer.tasks.params import PoolingParams


@dataclass(frozen=True, kw_only=True)
class PredictionRequest(PoolingRequest):
    """alone: of one text or pair that is in no list."""

    alone: bool


def embed_request(fields: Fields) -> EmbeddingRequest:
    """Of vectors, which are of length 1 unless the request wants them as they are. Raises RequestError, as the others
    do."""
    listed, name = fields.prompts("inputs"), fields.text("prompt_name")
    params = PoolingParams(dimensions=fields.take("dimensions"), use_activation=fields.flag("normalize", True))
    truncate = _end(fields)
    return EmbeddingRequest(texts=listed, params=params, truncate=truncate, prompt_name=name, prompt=None)


def predict_request(fields: Fields) -> PredictionRequest:
    """Of classes. What is alone is text, or a list of one text or of two, which are a pair; several are a list of such
    lists."""
    inputs, params = fields.take("inputs"), _activation(fields)
    several = isinstance(inputs, list) and bool(inputs) and isinstance(inputs[0], list)
    pairs = [_text_or_pair(entry) for entry in (inputs if several else [inputs])]
    return PredictionRequest(texts=pairs, params=params, truncate=_end(fields), alone=not several)


def rank_request(fields: Fields) -> RankingRequest:
    """Of documents, the best first."""
    query, documents = fields.text("query"), fields.texts("texts")
    if not query:
        raise RequestError("query must be text, and is empty", "query")
    shown, params = fields.flag("return_text"), _activation(fields)
    truncate = _end(fields)
    return RankingRequest(
        texts=[query, *documents],
        queries=1,
        params=params,
        truncate=truncate,
        documents=documents,
        top_n=None,
        shown=shown,
    )


def _activation(fields: Fields) -> PoolingParams:
    return PoolingParams(use_activation=False if fields.flag("raw_scores") else None)


def _end(fields: Fields) -> bool:
    """Whether texts that are too long are cut; takes all that is left."""
    truncate = fields.flag("truncate")
    fields.only("truncation_direction", "Right", "right", remedy="the end of a text is what is cut")
    fields.skip(("model",))
    fields.end()
    return truncate


def _text_or_pair(value: Any) -> str | tuple[str, str]:
    pair = texts("inputs", value)
    if len(pair) > 2:
        raise RequestError(f"inputs: a text, or a pair of two, and not {len(pair)}", "inputs")
    return pair[0] if len(pair) == 1 else (pair[0], pair[1])


def model_type(task: str, labels: Sequence[str]) -> Json:
    """What the model does. labels: of its classes."""
    if task != CLASSIFY:
        return {"embedding" if task == EMBED else "generation": {}}
    kind = "reranker" if len(labels) == 1 else "classifier"
    numbers = {label: i for i, label in enumerate(labels)}
    return {kind: {"id2label": {str(i): label for label, i in numbers.items()}, "label2id": numbers}}


def predictions(output: ClassificationRequestOutput, labels: Sequence[str]) -> list[Json]:
    """The classes of a text, the likeliest first."""
    scores = output.outputs.probs.tolist()
    pairs = sorted(zip(labels, scores, strict=True), key=lambda pair: -pair[1])
    return [{"label": label, "score": score} for label, score in pairs]


def ranking(asked: RankingRequest, scores: list[float]) -> list[Json]:
    """The documents, the best first."""
    entries = ranked(asked.documents, scores, None)
    return [
        {"index": entry.index, "score": entry.relevance_score} | ({"text": entry.document} if asked.shown else {})
        for entry in entries
    ]
