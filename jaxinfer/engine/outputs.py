"""What comes back for a prompt. Names are vLLM's."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxinfer.engine.request import FinishReason


@dataclass(frozen=True)
class Logprob:
    """Natural logarithm of a token's probability, its rank among all tokens (1 is the likeliest), its text."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass(frozen=True)
class CompletionOutput:
    """One continuation. finish_reason: "stop" (an EOS or stop id, or a stop string; which one is in stop_reason:
    None for EOS) or "length". logprobs: one dict a token, by token id, the sampled token always among them."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    stop_reason: int | str | None = None
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None

    def finished(self) -> bool:
        """Whether it has ended."""
        return self.finish_reason is not None


@dataclass(frozen=True)
class RequestMetrics:
    """Seconds; time_to_first_token counts from when the request was added, waiting and compiling included.
    cached_tokens: how many of the prompt's tokens the prefix cache had. arrival_time: when the request was added, in
    seconds since the epoch."""

    time_to_first_token: float
    total: float
    preemptions: int
    cached_tokens: int = 0
    arrival_time: float = 0.0

    @property
    def first_token_latency(self) -> float:
        """vLLM's name for time_to_first_token."""
        return self.time_to_first_token

    @property
    def first_token_time(self) -> float:
        """When the first token came, in seconds since the epoch."""
        return self.arrival_time + self.time_to_first_token

    @property
    def finished_time(self) -> float:
        """When the last one came, or now, in seconds since the epoch."""
        return self.arrival_time + self.total

    last_token_time = finished_time


NO_METRICS = RequestMetrics(0.0, 0.0, 0)


@dataclass(frozen=True)
class RequestOutput:
    """A prompt (None where ids were given) with its continuations, SamplingParams.n of them.

    prompt_logprobs: where asked for, one dict a token of the prompt, by token id; None for the first token.
    index: the prompt's place in what was given to `generate`.
    error: why the prompt was not served, where `on_error="return"` asked for that instead of an exception.
    """

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    index: int = 0
    error: str | None = None

    @property
    def num_cached_tokens(self) -> int:
        """vLLM's name for metrics.cached_tokens."""
        return self.metrics.cached_tokens


@dataclass(frozen=True)
class ScoreOutput:
    """How likely a text is.

    text: what was scored (None where ids were given). token_ids: of what was scored; logprobs: natural logarithms of
    their probabilities, each given all tokens before it; num_prompt_tokens: how many came before the first of them.
    is_greedy: each was the likeliest one. index, error: as in RequestOutput.
    """

    index: int
    text: str | None
    token_ids: list[int]
    logprobs: list[float]
    is_greedy: bool
    num_prompt_tokens: int
    metrics: RequestMetrics = NO_METRICS
    error: str | None = None

    @property
    def logprob(self) -> float:
        """Of the text: the sum."""
        return math.fsum(self.logprobs)

    @property
    def perplexity(self) -> float:
        """Per token."""
        return self._perplexity(len(self.token_ids))

    @property
    def word_perplexity(self) -> float | None:
        """Per word, of those that white space separates."""
        return None if self.text is None else self._perplexity(len(self.text.split()))

    @property
    def byte_perplexity(self) -> float | None:
        """Per byte of UTF-8."""
        return None if self.text is None else self._perplexity(len(self.text.encode()))

    def _perplexity(self, units: int) -> float:
        try:
            return math.exp(-self.logprob / units) if units else math.nan
        except OverflowError:
            return math.inf


def score_error(index: int, error: str) -> ScoreOutput:
    """The output of a text that can't be scored."""
    return ScoreOutput(index, None, [], [], False, 0, error=error)


def error_output(index: int, error: str) -> RequestOutput:
    """The output of a prompt that can't be served."""
    completion = CompletionOutput(index=0, text="", token_ids=[], finish_reason="error")
    return RequestOutput(-1, None, [], [completion], True, NO_METRICS, index=index, error=error)
