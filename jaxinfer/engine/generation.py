"""The host's side of a request: its text, its log-probabilities, why it ended."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from jaxinfer.engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from jaxinfer.engine.request import FinishReason, Request
from jaxinfer.sampling.logprobs import Logprobs
from jaxinfer.sampling.sampler import NONE_LEFT
from jaxinfer.text.base import Tokenizer
from jaxinfer.text.detokenize import Detokenizer
from jaxinfer.text.stop import StopStrings

Ranked = dict[int, Logprob]


class SequenceOutput:
    """Takes one sequence's tokens as they are sampled and turns them into text, until something ends it."""

    def __init__(self, request: Request, tokenizer: Tokenizer, index: int = 0):
        self.request = request
        self.index = index
        self.stop_reason: int | str | None = None
        self.error: str | None = None
        self.unsound = False  # the model computes no numbers
        self.text = ""
        self.prompt_logprobs: list[Ranked | None] = [None]
        params = request.params
        self._detokenizer = None
        if params.detokenize:
            self._detokenizer = Detokenizer(tokenizer, params.skip_special_tokens, request.tokens)
        self._least = params.least(request.prompt_length)
        self._stops = StopStrings(params.stop_strings, params.include_stop_str_in_output)
        self._token_text = tokenizer.token_text
        self._logprobs: list[Ranked] = []
        self._cumulative = 0.0
        self._arrived, self._added = time.time(), time.perf_counter()
        self._first: float | None = None
        self._finished: float | None = None
        self._told_text = self._told_tokens = 0  # how much `delta` has given
        self._told_end = False

    @property
    def finished(self) -> bool:
        return self.request.finish_reason is not None

    def accept(self, tokens: Sequence[int], logprobs: Logprobs | None = None, row: int = 0) -> None:
        """Appends sampled tokens up to the one that ends the request; those after it are dropped."""
        request, params = self.request, self.request.params
        self._first = self._first or time.perf_counter()
        text: list[str] = []
        may_end = False
        for step, token in enumerate(tokens):
            if token < 0 or self.error is not None:
                self.error = self.error or self._why_none(token)
                request.finish_reason = "error"
                break
            request.tokens.append(token)
            if params.logprobs is not None and logprobs is not None:
                ranked = self._ranked(token, params.logprobs, logprobs, (step, row))
                self._logprobs.append(ranked)
                self._cumulative += ranked[token].logprob
            may_end = len(request.tokens) - request.prompt_length > self._least
            if token in request.stop_ids and may_end:
                self.stop_reason = token if token in (params.stop_token_ids or ()) else None
                if params.include_stop_str_in_output:
                    text.append(self._stops.push(self._detokenize(token)))
                request.finish_reason = "stop"
                request.length = len(request.tokens)  # the device has stopped here, too, whatever it was asked for
                break
            text.append(self._stops.push(self._detokenize(token), may_end))
            if request.guide is not None:
                request.guide.accept([token])
                if request.guide.error is not None:
                    request.finish_reason, self.error = "error", request.guide.error
                    break
            if self._stops.matched is not None or (request.guide is not None and request.guide.complete):
                request.finish_reason = "stop"
                break
            if len(request.tokens) >= request.limit:
                request.finish_reason = "length"
                break
        if self.finished:
            if self._detokenizer is not None:
                text.append(self._stops.push(self._detokenizer.finish(), may_end) + self._stops.finish())
            if self._stops.matched is not None and self.error is None:
                request.finish_reason, self.stop_reason = "stop", self._stops.matched
            self._finished = time.perf_counter()
        self.text += "".join(text)

    def accept_scored(self, logprobs: Logprobs, position: int, at: slice) -> None:
        """Log-probabilities of the prompt's tokens from `position` on."""
        request = self.request
        assert request.params.prompt_logprobs is not None
        for i, t in enumerate(range(at.start, at.stop), position):
            # A prompt that is computed once more after a preemption has been here before.
            if i == len(self.prompt_logprobs):
                token = request.tokens[i]
                if math.isnan(logprobs.sampled[t]):
                    self.error, self.unsound = not_finite(i), True
                self.prompt_logprobs.append(self._ranked(token, request.params.prompt_logprobs, logprobs, t))

    def end(self, reason: FinishReason) -> None:
        """Ends the request from outside; the text so far stays."""
        self.request.finish_reason = reason
        self._finished = time.perf_counter()

    def completion(self) -> CompletionOutput:
        """What there is so far."""
        wants = self.request.params.logprobs is not None
        return CompletionOutput(
            index=self.index,
            text=self.text,
            token_ids=self.request.output_token_ids,
            finish_reason=self.request.finish_reason,
            stop_reason=self.stop_reason,
            cumulative_logprob=self._cumulative if wants else None,
            logprobs=list(self._logprobs) if wants else None,
        )

    def delta(self) -> CompletionOutput | None:
        """What has come since the last call; None if nothing has, nor the end."""
        tokens = self.request.tokens[self.request.prompt_length + self._told_tokens :]
        text = self.text[self._told_text :]
        if not tokens and not text and (not self.finished or self._told_end):
            return None
        logprobs = self._logprobs[self._told_tokens :] if self.request.params.logprobs is not None else None
        self._told_tokens += len(tokens)
        self._told_text += len(text)
        self._told_end = self.finished
        return CompletionOutput(
            index=self.index,
            text=text,
            token_ids=tokens,
            finish_reason=self.request.finish_reason,
            stop_reason=self.stop_reason,
            logprobs=logprobs,
        )

    def metrics(self) -> RequestMetrics:
        """Its times so far."""
        now = self._finished or time.perf_counter()
        request = self.request
        first = (self._first or now) - self._added
        return RequestMetrics(first, now - self._added, request.preemptions, request.hits, self._arrived)

    def _why_none(self, token: int) -> str:
        """Why this came in place of a token."""
        tokens = len(self.request.tokens)
        guide = self.request.guide
        if token == NONE_LEFT and guide is not None:
            others = "it and the other sampling parameters exclude all of them"
            return f"no token is left after {tokens}: {guide.error or f'{guide.place}: {others}'}"
        if token == NONE_LEFT and (self.request.params.has_masks or self._least):
            return f"no token is left after {tokens}: the sampling parameters exclude all of them"
        self.unsound = True
        return not_finite(tokens)

    def _detokenize(self, token: int) -> str:
        return "" if self._detokenizer is None else self._detokenizer.push([token])

    def _ranked(self, token: int, wanted: int, info: Logprobs, at: int | tuple[int, int]) -> Ranked:
        ranked = {token: Logprob(float(info.sampled[at]), int(info.rank[at]), self._token_text(token))}
        for rank, (i, v) in enumerate(zip(info.top_ids[at][:wanted], info.top[at][:wanted], strict=True), 1):
            ranked.setdefault(int(i), Logprob(float(v), rank, self._token_text(int(i))))
        return ranked


def not_finite(tokens: int) -> str:
    """What is said of a model that computes no numbers."""
    return (
        f"the model's logits after {tokens} tokens are NaN or infinite: its weights are damaged, or exceed what the "
        'dtype can hold; try dtype="float32"'
    )


class RequestGroup:
    """The continuations of one prompt: SamplingParams.n of them."""

    def __init__(self, prompt: str | None, members: list[SequenceOutput]):
        self.prompt = prompt
        self.members = members
        self._told = False  # whether `delta` has given what is of the prompt

    @property
    def finished(self) -> bool:
        return all(member.finished for member in self.members)

    @property
    def waiting(self) -> bool:
        """Whether none of them has a place in the batch."""
        return not self.finished and all(member.request.slot < 0 for member in self.members)

    def output(self, index: int = 0) -> RequestOutput:
        """What there is so far; `index` is the prompt's place in its list."""
        return self._output([member.completion() for member in self.members], index, True)

    def delta(self, index: int = 0) -> RequestOutput:
        """What has come since the last call, of those continuations that have something. The prompt's ids and
        log-probabilities are in the first one."""
        outputs = [delta for member in self.members if (delta := member.delta()) is not None]
        first, self._told = not self._told, True
        return self._output(outputs, index, first)

    def _output(self, outputs: list[CompletionOutput], index: int, with_prompt: bool) -> RequestOutput:
        first = self.members[0]
        request = first.request
        failed = next((member for member in self.members if member.error is not None), None)
        scored = with_prompt and request.params.prompt_logprobs is not None
        return RequestOutput(
            request_id=request.id,
            prompt=self.prompt,
            prompt_token_ids=request.tokens[: request.prompt_length] if with_prompt else [],
            outputs=outputs,
            finished=self.finished,
            metrics=first.metrics(),
            index=index,
            error=None if failed is None else failed.error,
            is_request_error=failed is not None and not failed.unsound,
            prompt_logprobs=list(first.prompt_logprobs) if scored else None,
        )
