"""What each task asks of the LLM."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from jaxinfer.batch.results import Results
from jaxinfer.batch.row import Ask, Row, Task
from jaxinfer.batch.work import Work, Worker
from jaxinfer.batch.writer import Result
from jaxinfer.engine.prompts import Encoded, encode_prompt
from jaxinfer.engine.scoring import encode_pair, encode_text
from jaxinfer.llm import LLM
from jaxinfer.sampling.params import DEFAULT_MAX_TOKENS, SamplingParams
from jaxinfer.tasks.embed import WHOLE, EmbedTask, VectorOptions, finished
from jaxinfer.tasks.pairs import PairTask, ranked
from jaxinfer.tasks.params import PoolingParams
from jaxinfer.tasks.score import Pair
from jaxinfer.tasks.stream import Ask as HowAsked


class OfTokens(Worker):
    """Of models that read and write text token by token."""

    @property
    def facts(self) -> dict[str, Any]:
        return {"dtype": str(self.llm.dtype), "max_model_len": self.llm.sizes.max_model_len}

    @property
    def defaults(self) -> SamplingParams:
        return self.llm.get_default_sampling_params().with_changes(max_tokens=DEFAULT_MAX_TOKENS)

    def fitting(self, ids: list[int], room: int) -> list[int]:
        """The last `room` tokens, BOS before them where there was one; all of them unless they are to be cut."""
        if not self.truncate or len(ids) <= room:
            return ids
        bos = ids[:1] if ids[0] == self.llm.tokenizer.bos_token_id else []
        return bos + ids[len(ids) - room + len(bos) :]


class Scoring(OfTokens):
    """Texts and continuations, to log-probabilities."""

    def work(self, row: Row, ask: Ask, key: object) -> Work:
        assert ask.prompt is not None
        if ask.continuation is None:
            text: Any = ask.prompt
            prompt, scored = encode_text(ask.prompt, self.llm.tokenizer)
        else:
            text = ask.continuation
            prompt, scored = encode_pair(ask.prompt, ask.continuation, self.llm.tokenizer)
        ids = self.fitting([*prompt, *scored], self.llm.sizes.max_model_len + 1)
        count = min(len(scored), len(ids) - 1)
        whole = isinstance(text, str) and count == len(scored)
        return Work(row, ids, len(ids), [Pair(text if whole else None, ids[:-count], ids[-count:], ask.adapter)])

    def outputs(self, items: Iterable[Any]) -> Iterator[Any]:
        return self.llm.score_iter(items, on_error="return")

    def result(self, row: Row, outputs: list[Any]) -> Result:
        return self.results.scored(row, *outputs)


class Generation(OfTokens):
    """Prompts and conversations, to continuations."""

    def work(self, row: Row, ask: Ask, key: object) -> Work:
        context, params = self.llm.sizes.max_model_len, ask.params
        assert params is not None
        if ask.messages is not None:
            ids = self.llm.chat_prompt(ask.messages, ask.tools)["prompt_token_ids"]
        else:
            assert ask.prompt is not None
            ids = encode_prompt(ask.prompt, self.llm.tokenizer).ids
        wanted = min(params.max_tokens or 1, context // 2)
        ids = self.fitting(ids, context - wanted)
        if params.seed is None and not params.greedy:
            digest = hashlib.blake2b(f"{self.seed}:{key}".encode(), digest_size=8).digest()
            params = dataclasses.replace(params, seed=int.from_bytes(digest) >> 2)
        length = min(len(ids) + (params.max_tokens or context), context)
        return Work(row, ids, length, [(Encoded(None, ids, adapter=ask.adapter), params)])

    def outputs(self, items: Iterable[Any]) -> Iterator[Any]:
        return self.llm.generate_iter(items, on_error="return")

    def result(self, row: Row, outputs: list[Any]) -> Result:
        return self.results.generated(row, *outputs)


class OfTexts(Worker):
    """Of models that make numbers of whole texts.

    how: what the model is asked.
    """

    how: HowAsked

    @property
    def facts(self) -> dict[str, Any]:
        loaded = self.how.task.loaded
        made = {"pooler": str(loaded.engine.programs.pooler), "pooler_config": dict(loaded.pooling)}
        return {"dtype": str(self.llm.dtype), "max_model_len": self.how.text_options.most, **made}

    def work(self, row: Row, ask: Ask, key: object) -> Work:
        texts = self.texts(ask)
        first = texts[0][0] if isinstance(texts[0], tuple) else texts[0]
        return Work(row, first, sum(map(_length, texts)), texts)

    def texts(self, ask: Ask) -> Sequence[Any]:
        """What the model gets for a row."""
        return ask.texts

    def outputs(self, items: Iterable[Any]) -> Iterator[Any]:
        return self.how.task.run(items, self.how.text_options, self.how.options, "return")


def _length(text: Any) -> int:
    return sum(map(len, text)) if isinstance(text, tuple) else len(text)


def _tokens(outputs: list[Any]) -> int:
    """Of all texts."""
    return sum(len(output.prompt_token_ids) for output in outputs)


class Embedding(OfTexts):
    """Texts to vectors, each cut as its row wants it."""

    def __init__(self, llm: LLM, results: Results, **options: Any):
        super().__init__(llm, results, **options)
        given = self.params
        params = PoolingParams(dimensions=given.get("dimensions"), use_activation=given.get("normalize"))
        how = llm.embedding(params, self.truncate, given.get("prompt_name"), given.get("prompt"))
        assert isinstance(how.task, EmbedTask)
        self.embed, self.wanted, self.how = how.task, how.options, dataclasses.replace(how, options=WHOLE)
        size = self.embed.loaded.size
        self.results = dataclasses.replace(results, size=min(size, self.wanted.dimensions or size))

    @property
    def facts(self) -> dict[str, Any]:
        return {**super().facts, "normalize": self.wanted.normalize}

    def work(self, row: Row, ask: Ask, key: object) -> Work:
        self._wanted(ask)
        return super().work(row, ask, key)

    def result(self, row: Row, outputs: list[Any]) -> Result:
        assert row.ask is not None
        wanted = self._wanted(row.ask)
        vectors = [finished(output.outputs.embedding[None], wanted)[0] for output in outputs]
        return self.results.embedded(row, vectors, _tokens(outputs))

    def _wanted(self, ask: Ask) -> VectorOptions:
        """Raises ValueError."""
        return self.wanted if ask.dimensions is None else self.embed.options(ask.dimensions, self.wanted.normalize)


class Classification(OfTexts):
    """Texts, and pairs of them, to classes."""

    def __init__(self, llm: LLM, results: Results, **options: Any):
        super().__init__(llm, results, **options)
        self.how = llm.classifying(PoolingParams(use_activation=self.params.get("use_activation")), self.truncate)
        self.results = dataclasses.replace(results, size=len(llm.labels), logits=not self.how.options)

    def result(self, row: Row, outputs: list[Any]) -> Result:
        return self.results.classified(row, outputs[0].outputs, _tokens(outputs))


class Ranking(OfTexts):
    """Documents by how well they answer a query: by both at once, or by the similarity of their vectors."""

    def __init__(self, llm: LLM, results: Results, **options: Any):
        super().__init__(llm, results, **options)
        ranked([], [], self.params.get("top_n"))  # what is wrong is said now
        self.how = llm.scoring(PoolingParams(), self.truncate, None)
        self.by_pairs = isinstance(self.how.task, PairTask)

    def texts(self, ask: Ask) -> Sequence[Any]:
        return [(ask.query, text) for text in ask.texts] if self.by_pairs else [ask.query, *ask.texts]

    def result(self, row: Row, outputs: list[Any]) -> Result:
        scored = outputs if self.by_pairs else [self.llm.similar(outputs[0], output) for output in outputs[1:]]
        scores = [output.outputs.score for output in scored]
        best = ranked(scores, scores, self.params.get("top_n"))
        return self.results.ranked(row, [(entry.index, entry.relevance_score) for entry in best], _tokens(outputs))


WORKERS: dict[Task, type[Worker]] = {
    "generate": Generation,
    "chat": Generation,
    "score": Scoring,
    "embed": Embedding,
    "classify": Classification,
    "rerank": Ranking,
}
