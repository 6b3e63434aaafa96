"""The host's side of one request: its text, its log-probabilities, why it ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from jaxinfer.engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from jaxinfer.engine.request import FinishReason, Request
from jaxinfer.sampling.sample import Logprobs
from jaxinfer.text.detokenize import Detokenizer
from jaxinfer.text.stop import StopStrings
from jaxinfer.text.tokenizer import Tokenizer


class Generation:
    """Takes a request's tokens as they are sampled and turns them into text, until something ends it."""

    def __init__(self, request: Request, prompt: str | None, tokenizer: Tokenizer):
        self.request = request
        self.prompt = prompt
        self.stop_reason: int | str | None = None
        self.text = ""
        self.pending_text = ""  # released and not yet taken by `take_text`
        params = request.params
        self._detokenizer = Detokenizer(tokenizer, params.skip_special_tokens)
        self._stops = StopStrings(params.stop_strings, params.include_stop_str_in_output)
        self._decode_token: Callable[[int], str] = lambda i: tokenizer.decode([i], skip_special_tokens=False)
        self._logprobs: list[dict[int, Logprob]] = []
        self._cumulative = 0.0
        self._added = time.perf_counter()
        self._first: float | None = None
        self._finished: float | None = None

    def accept(self, tokens: Sequence[int], logprobs: Logprobs | None, row: int) -> None:
        """Appends sampled tokens up to the one that ends the request; those after it are dropped."""
        request, params = self.request, self.request.params
        self._first = self._first or time.perf_counter()
        text: list[str] = []
        for step, token in enumerate(tokens):
            request.tokens.append(token)
            if params.logprobs is not None and logprobs is not None:
                self._add_logprobs(token, params.logprobs, logprobs, step, row)
            generated = len(request.tokens) - request.prompt_length
            if token in request.stop_ids and generated > params.min_tokens:
                self.stop_reason = token if token in (params.stop_token_ids or ()) else None
                if params.include_stop_str_in_output:
                    text.append(self._stops.push(self._detokenizer.push([token])))
                request.finish_reason = "stop"
                break
            piece = self._detokenizer.push([token])
            text.append(self._stops.push(piece) if generated > params.min_tokens else piece)
            if self._stops.matched is not None:
                self.stop_reason = self._stops.matched
                request.finish_reason = "stop"
                break
            if request.room <= 0:
                request.finish_reason = "length"
                break
        if request.finish_reason is not None:
            if self._stops.matched is None:
                text.append(self._stops.push(self._detokenizer.finish()) + self._stops.finish())
            self._finished = time.perf_counter()
        added = "".join(text)
        self.text += added
        self.pending_text += added

    def end(self, reason: FinishReason) -> None:
        """Ends the request from outside; the text so far stays."""
        self.request.finish_reason = reason
        self._finished = time.perf_counter()

    def take_text(self) -> str:
        """The text released since the last call."""
        text, self.pending_text = self.pending_text, ""
        return text

    def output(self) -> RequestOutput:
        """What there is so far."""
        request = self.request
        wants = request.params.logprobs is not None
        completion = CompletionOutput(
            index=0,
            text=self.text,
            token_ids=request.output_token_ids,
            finish_reason=request.finish_reason,
            stop_reason=self.stop_reason,
            cumulative_logprob=self._cumulative if wants else None,
            logprobs=list(self._logprobs) if wants else None,
        )
        now = self._finished or time.perf_counter()
        metrics = RequestMetrics((self._first or now) - self._added, now - self._added, request.preemptions)
        finished = request.finish_reason is not None
        prompt_ids = request.tokens[: request.prompt_length]
        return RequestOutput(request.id, self.prompt, prompt_ids, [completion], finished, metrics)

    def _add_logprobs(self, token: int, wanted: int, info: Logprobs, step: int, row: int) -> None:
        value = float(np.asarray(info.sampled)[step, row])
        ranked = {token: Logprob(value, int(np.asarray(info.rank)[step, row]), self._decode_token(token))}
        ids, values = np.asarray(info.top_ids)[step, row], np.asarray(info.top)[step, row]
        for rank, (i, v) in enumerate(zip(ids[:wanted].tolist(), values[:wanted].tolist(), strict=True), 1):
            ranked.setdefault(i, Logprob(v, rank, self._decode_token(i)))
        self._logprobs.append(ranked)
        self._cumulative += value
