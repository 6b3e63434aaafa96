"""What the LLM is asked for a row, and what comes of it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxinfer.batch.results import Results
from jaxinfer.batch.row import Row
from jaxinfer.batch.writer import Result
from jaxinfer.engine.prompts import Encoded, encode_prompt
from jaxinfer.engine.scoring import encode_pair, encode_text
from jaxinfer.llm import LLM
from jaxinfer.sampling.params import SamplingParams
from jaxinfer.tasks.score import Pair


class Work(NamedTuple):
    """A row that is ready to run: see `order.Work`.

    row: what it is of.
    prompt: token ids, with those that are to be scored.
    length: tokens that it may have in the end.
    params: None when scoring.
    scored: how many tokens at the prompt's end are to be scored.
    text: what they are; None where the row has ids, where some were cut off, and when generating.
    """

    row: Row
    prompt: list[int]
    length: int
    params: SamplingParams | None = None
    scored: int = 0
    text: str | None = None


class Worker:
    """Runs rows.

    llm, results: what runs them, and what is made of its outputs.
    seed: of those that sample and have none of their own.
    truncate: prompts that are too long.
    """

    def __init__(self, llm: LLM, results: Results, *, seed: int, truncate: bool):
        self.llm, self.results, self.seed, self.truncate = llm, results, seed, truncate

    def prepare(self, row: Row, key: object) -> Work | str:
        """The row's work, or why it can't be done. key: by what the row is known, for its seed."""
        error = row.error or self.results.refuse(row)
        if error is not None:
            return error
        try:
            return self._scoring(row) if self.results.task == "score" else self._generation(row, key)
        except ValueError as problem:
            return f"{row.where}: {problem}"

    def run(self, works: Iterator[Work]) -> Iterator[tuple[Work, Result]]:
        """Each with its result, as they are done. They are taken as they are needed."""
        running: dict[int, Work] = {}

        def items() -> Iterator[Any]:
            for index, work in enumerate(works):
                running[index] = work
                if self.results.task == "score":
                    yield Pair(work.text, work.prompt[: -work.scored], work.prompt[-work.scored :])
                else:
                    yield Encoded(None, work.prompt), work.params

        ask: Any = self.llm.score_iter if self.results.task == "score" else self.llm.generate_iter
        for output in ask(items(), on_error="return"):
            work = running.pop(output.index)
            if output.error:
                yield work, self.results.failed(work.row, f"{work.row.where}: {output.error}")
            elif self.results.task == "score":
                yield work, self.results.scored(work.row, output)
            else:
                yield work, self.results.generated(work.row, output)

    def _scoring(self, row: Row) -> Work:
        ask, context = row.ask, self.llm.sizes.max_model_len
        assert ask is not None
        assert ask.prompt is not None
        if ask.continuation is None:
            text: Any = ask.prompt
            prompt, scored = encode_text(ask.prompt, self.llm.tokenizer)
        else:
            text = ask.continuation
            prompt, scored = encode_pair(ask.prompt, ask.continuation, self.llm.tokenizer)
        ids = self._fitting([*prompt, *scored], context + 1)
        count = min(len(scored), len(ids) - 1)
        whole = isinstance(text, str) and count == len(scored)
        return Work(row, ids, len(ids), None, count, text if whole else None)

    def _generation(self, row: Row, key: object) -> Work:
        ask, context = row.ask, self.llm.sizes.max_model_len
        assert ask is not None
        params = ask.params
        assert params is not None
        if ask.messages is not None:
            ids = self.llm.chat_prompt(ask.messages, ask.tools)["prompt_token_ids"]
        else:
            assert ask.prompt is not None
            ids = encode_prompt(ask.prompt, self.llm.tokenizer).ids
        wanted = min(params.max_tokens or 1, context // 2)
        ids = self._fitting(ids, context - wanted)
        if params.seed is None and not params.greedy:
            digest = hashlib.blake2b(f"{self.seed}:{key}".encode(), digest_size=8).digest()
            params = dataclasses.replace(params, seed=int.from_bytes(digest) >> 2)
        return Work(row, ids, min(len(ids) + (params.max_tokens or context), context), params)

    def _fitting(self, ids: list[int], room: int) -> list[int]:
        """The last `room` tokens, BOS before them where there was one; all of them unless they are to be cut."""
        if not self.truncate or len(ids) <= room:
            return ids
        bos = ids[:1] if ids[0] == self.llm.tokenizer.bos_token_id else []
        return bos + ids[len(ids) - room + len(bos) :]
