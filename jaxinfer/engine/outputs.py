"""What comes back for a prompt. Names are vLLM's."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np

from jaxinfer.engine.request import FinishReason

Out = TypeVar("Out", bound="EmbeddingOutput | ClassificationOutput | ScoringOutput | PoolingOutput")


@dataclass(frozen=True)
class Logprob:
    """How likely a token was.

    logprob: natural logarithm of its probability.
    rank: among all tokens; 1 is the likeliest.
    decoded_token: its text.
    """

    logprob: float
    rank: int
    decoded_token: str


@dataclass(frozen=True)
class CompletionOutput:
    """One continuation.

    index: among those of its prompt.
    text: as far as it goes; "" without detokenizing.
    token_ids: a stop id among them.
    finish_reason: "stop" (an EOS or stop id, or a stop string), "length", "abort", or "error", which
        `RequestOutput.error` tells; None while it runs.
    stop_reason: which stop id or string it was; None for EOS.
    cumulative_logprob: of all tokens; None where log-probabilities were not asked for.
    logprobs: one dict a token, by token id, the sampled token always among them.
    """

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
    """Times of a request, in seconds.

    time_to_first_token: from when the request was added, waiting and compiling included.
    total: until the last token, or now.
    preemptions: how often it gave its pages back and was computed again.
    cached_tokens: how many of the prompt's tokens the prefix cache had.
    arrival_time: when the request was added, since the epoch.
    """

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
    """A prompt with its continuations.

    request_id: the engine's number; -1 of what was not served.
    prompt: None where ids were given.
    prompt_token_ids: what was continued.
    outputs: SamplingParams.n continuations.
    finished: whether all of them have ended.
    metrics: of the first continuation.
    prompt_logprobs: where asked for, one dict a token of the prompt, by token id; None for the first token.
    index: the prompt's place in what was given to `generate`.
    error: why the prompt was not served, where `on_error="return"` asked for that instead of an exception; or why it
        broke off, with the tokens so far: logits that are no numbers, or parameters that leave no token.
    is_request_error: whether it broke off because its parameters leave no token.
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
    is_request_error: bool = False

    @property
    def num_cached_tokens(self) -> int:
        """vLLM's name for metrics.cached_tokens."""
        return self.metrics.cached_tokens


@dataclass(frozen=True)
class ScoreOutput:
    """How likely a text is.

    index, error: as in RequestOutput.
    text: what was scored; None where ids were given.
    token_ids: of what was scored.
    logprobs: natural logarithms of their probabilities, each given all tokens before it; may be NaN where there is an
        error.
    is_greedy: each was the likeliest one.
    num_prompt_tokens: how many came before the first of them.
    metrics: of the request.
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


@dataclass(frozen=True)
class EmbeddingOutput:
    """A text's vector.

    embedding: f32[D]; empty where there is an error.
    """

    embedding: np.ndarray

    @property
    def hidden_size(self) -> int:
        """D, by vLLM's name."""
        return len(self.embedding)


@dataclass(frozen=True)
class ClassificationOutput:
    """A text's classes.

    probs: f32[C]: of one class of several (softmax), of each class (sigmoid), or values of a regression, as the
        checkpoint's `problem_type` says; logits where these were asked for; empty where there is an error.
    label: the name of the class with the largest one, and label_id its number; "" and -1 where there is an error.
    """

    probs: np.ndarray
    label: str
    label_id: int

    @property
    def num_classes(self) -> int:
        """C, by vLLM's name."""
        return len(self.probs)


@dataclass(frozen=True)
class ScoringOutput:
    """How well a document answers a query, or how near two texts are.

    score: after the checkpoint's activation, or by its similarity function; NaN where there is an error.
    """

    score: float


@dataclass(frozen=True)
class PoolingOutput:
    """What a model makes of a text.

    data: f32[N] of the text, or f32[tokens, N] of each of its tokens; empty where there is an error.
    """

    data: np.ndarray


@dataclass(frozen=True)
class PoolingRequestOutput(Generic[Out]):
    """What comes back for a text, or for a pair of texts.

    request_id: its number; -1 of what was not served.
    prompt_token_ids: of the text, with prompt and special tokens, as far as it was not cut.
    index, error: as in RequestOutput.
    outputs: what the model makes of it.
    """

    request_id: int
    prompt_token_ids: list[int]
    index: int = 0
    error: str | None = None
    outputs: Out = field(kw_only=True)

    @property
    def finished(self) -> bool:
        """As vLLM has it."""
        return True


class EmbeddingRequestOutput(PoolingRequestOutput[EmbeddingOutput]):
    """With its vector."""


class ClassificationRequestOutput(PoolingRequestOutput[ClassificationOutput]):
    """With its classes."""


class ScoringRequestOutput(PoolingRequestOutput[ScoringOutput]):
    """With its score."""


@dataclass(frozen=True)
class RerankResult:
    """A document's place among others.

    index: its number in what was given.
    relevance_score: as in ScoringOutput.
    document: as it was given.
    """

    index: int
    relevance_score: float
    document: Any


def score_error(index: int, error: str) -> ScoreOutput:
    """The output of a text that can't be scored."""
    return ScoreOutput(index, None, [], [], False, 0, error=error)


def error_output(index: int, error: str) -> RequestOutput:
    """The output of a prompt that can't be served."""
    completion = CompletionOutput(index=0, text="", token_ids=[], finish_reason="error")
    return RequestOutput(-1, None, [], [completion], True, NO_METRICS, index=index, error=error)
