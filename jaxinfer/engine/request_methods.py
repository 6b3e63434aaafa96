"""Requests as an engine takes them, checked against what it can serve."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterable, Sequence
from typing import Any

from jaxinfer.engine.adapter_methods import AdapterMethods
from jaxinfer.engine.constraints import guide_of
from jaxinfer.engine.exclusions import Exclusions, check_some_left, exclusions
from jaxinfer.engine.generation import RequestGroup, SequenceOutput
from jaxinfer.engine.guided.guide import Guide
from jaxinfer.engine.guided.guides import Guides
from jaxinfer.engine.request import Request
from jaxinfer.engine.scoring import SCORING, Scoring
from jaxinfer.errors import ContextLengthError, RequestError
from jaxinfer.sampling.params import MAX_STOP_IDS, SamplingParams
from jaxinfer.text.base import Tokenizer


class RequestMethods(AdapterMethods):
    """Those of Engine that make requests, and queue none. Any thread may call them: they read what was loaded, and
    nothing that changes."""

    tokenizer: Tokenizer
    eos_token_ids: tuple[int, ...]
    max_model_len: int
    guides: Guides
    _seed: int
    _next_id: int
    _id_lock: threading.Lock

    @property
    def vocab_size(self) -> int:
        return self.runner.model.config.vocab_size

    def new_group(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        prompt: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        adapter: Any = None,
    ) -> RequestGroup:
        """A request for `queue`. cache_salt, adapter: see Encoded. Raises RequestError for ids, a length or parameters
        that can't be served."""
        stop_ids, excluded, guide = self.check(prompt_token_ids, params)
        if not isinstance(priority, int) or isinstance(priority, bool):
            raise RequestError(f"priority is {priority!r:.100}: it must be an integer", "priority")
        length, (adapter_name, beside) = len(prompt_token_ids), self.adapter(adapter)
        # The first one's log-probabilities of the prompt are everyone's.
        later = dataclasses.replace(params, prompt_logprobs=None) if params.n > 1 else params
        first_id = self._new_ids(params.n)
        members = []
        for index in range(params.n):
            request = Request(
                id=first_id + index,
                prompt_length=length,
                tokens=list(prompt_token_ids),
                params=later if index else params,
                # Unseeded requests of one LLM differ from each other and are the same in the program's next run.
                seed=(self._seed << 32) + first_id + index if params.seed is None else params.seed + index,
                stop_ids=stop_ids,
                limit=self._limit(length, params),
                priority=priority,
                cache_salt=cache_salt,
                adapter=beside,
                adapter_name=adapter_name,
                scored_from=1 if params.prompt_logprobs is not None and not index else None,
                exclusions=excluded.anew() if excluded is not None else None,
                guide=guide.anew() if guide is not None else None,
            )
            members.append(SequenceOutput(request, self.tokenizer, index))
        return RequestGroup(prompt, members)

    def new_scoring(
        self, token_ids: Sequence[int], scored_from: int, text: str | None = None, adapter: Any = None
    ) -> Scoring:
        """A text for `queue`, whose tokens from `scored_from` on are scored. Raises RequestError for ids or a length
        that can't be served."""
        self.check_scoring(token_ids, scored_from)
        *tokens, target = token_ids
        adapter_name, beside = self.adapter(adapter)
        request = Request(
            id=self._new_ids(1),
            prompt_length=len(tokens),
            tokens=tokens,
            params=SCORING,
            seed=0,
            stop_ids=(),
            limit=len(tokens),
            adapter=beside,
            adapter_name=adapter_name,
            scored_from=scored_from,
            target=target,
        )
        return Scoring(request, text)

    def check_scoring(self, token_ids: Sequence[int], scored_from: int) -> None:
        """Raises RequestError for what `new_scoring` would refuse."""
        self._check_ids("the text", token_ids, "text")
        if not 1 <= scored_from < len(token_ids):
            raise RequestError(
                f"{len(token_ids)} tokens are given and those from place {scored_from} on are to be scored: at least "
                "one must be, and one must come before it",
                "text",
            )
        if len(token_ids) - 1 > self.max_model_len:
            raise ContextLengthError(
                f"the text has {len(token_ids)} tokens: with max_model_len {self.max_model_len} it may have at most "
                f"{self.max_model_len + 1}; shorten it, raise max_model_len, or use loglikelihood_rolling",
                "text",
            )
        self.scheduler.check(len(token_ids) - 1)

    def check(
        self, prompt_token_ids: Sequence[int], params: SamplingParams
    ) -> tuple[tuple[int, ...], Exclusions | None, Guide | None]:
        """What ends the prompt's continuations, the tokens that may not come, and the grammar that they follow. Raises
        what `new_group` does."""
        length = len(prompt_token_ids)
        self._check_ids("the prompt", prompt_token_ids, "prompt")
        if not length:
            raise RequestError("the prompt is empty: give at least one token", "prompt")
        if length >= self.max_model_len:
            raise ContextLengthError(
                f"the prompt has {length} tokens: with max_model_len {self.max_model_len} it may have at most "
                f"{self.max_model_len - 1}; shorten it or raise max_model_len",
                "prompt",
            )
        params.check_texts()
        for name, instead in (("stop", "stop_token_ids"), ("bad_words", "bad_words_ids")):
            if getattr(params, name):
                self.tokenizer.require(f"sampling parameter {name}", f"give {instead}", name)
        for name, ids in params.named_ids():
            self._check_ids(f"sampling parameter {name}", ids, name)
        eos = () if params.ignore_eos else self.eos_token_ids
        stop_ids = tuple(dict.fromkeys([*eos, *(params.stop_token_ids or ())]))
        if len(stop_ids) > MAX_STOP_IDS:
            raise RequestError(
                f"stop_token_ids {list(params.stop_token_ids or ())} and the checkpoint's EOS ids are {len(stop_ids)} "
                f"ids: at most {MAX_STOP_IDS} are supported; use stop strings for the rest",
                "stop_token_ids",
            )
        excluded = exclusions(params, self.tokenizer, self.eos_token_ids, length)
        always = excluded.always if excluded else ()
        check_some_left(params, always, stop_ids, length, self.vocab_size)
        self.scheduler.check(self._limit(length, params))
        return stop_ids, excluded, guide_of(self.guides, params, stop_ids, always, length, self.vocab_size)

    def _new_ids(self, count: int) -> int:
        """The first of `count` request ids."""
        with self._id_lock:
            self._next_id += count
            return self._next_id - count

    def _limit(self, prompt_length: int, params: SamplingParams) -> int:
        """The most tokens that a sequence may reach."""
        most = self.max_model_len if params.max_tokens is None else prompt_length + params.max_tokens
        return min(most, self.max_model_len)

    def _check_ids(self, where: str, ids: Iterable[int], param: str) -> None:
        vocab = self.vocab_size
        for i in ids:
            if not 0 <= i < vocab:
                raise RequestError(f"{where} has token id {i}: the model's ids go from 0 to {vocab - 1}", param)
