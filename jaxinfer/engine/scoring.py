"""How likely given texts are: the host's side of a scored text, and which tokens are scored given which."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence

from jaxinfer.engine.generation import not_finite
from jaxinfer.engine.outputs import RequestMetrics, ScoreOutput
from jaxinfer.engine.request import FinishReason, Request
from jaxinfer.errors import RequestError, UnsupportedError
from jaxinfer.sampling.ids import token_ids
from jaxinfer.sampling.logprobs import Logprobs
from jaxinfer.sampling.params import SamplingParams
from jaxinfer.text.base import Tokenizer

SCORING = SamplingParams(temperature=0.0, prompt_logprobs=0, detokenize=False)

Pair = tuple[list[int], list[int]]  # ids that are given, and ids that are scored


class Scoring:
    """Takes the log-probabilities of one text's tokens as they come. It is a group of its own, of one member."""

    def __init__(self, request: Request, text: str | None):
        self.request = request
        self.text = text
        self._logprobs: list[float] = []
        self._greedy = True
        self._arrived, self._added = time.time(), time.perf_counter()
        self.error: str | None = None
        self._finished = 0.0

    @property
    def members(self) -> list[Scoring]:
        """Itself."""
        return [self]

    @property
    def finished(self) -> bool:
        return self.request.finish_reason is not None

    def accept_scored(self, logprobs: Logprobs, position: int, at: slice) -> None:
        """Log-probabilities of the tokens from `position` on."""
        assert self.request.scored_from is not None
        # What is computed once more after a preemption has been here before.
        seen = self.request.scored_from + len(self._logprobs) - position
        at = slice(at.start + seen, at.stop)
        values = logprobs.sampled[at].tolist()
        if self.error is None and any(map(math.isnan, values)):
            first = next(i for i, value in enumerate(values) if math.isnan(value))
            self.error = not_finite(self.request.scored_from + len(self._logprobs) + first)
        self._logprobs += values
        self._greedy = self._greedy and bool((logprobs.rank[at] == 1).all())
        if self.request.scored_from + len(self._logprobs) > self.request.prompt_length:
            self.end("stop" if self.error is None else "error")

    def end(self, reason: FinishReason) -> None:
        """Ends the request."""
        self.request.finish_reason = reason
        self._finished = time.perf_counter()

    def output(self, index: int = 0) -> ScoreOutput:
        """The result; `index` is the text's place in its list."""
        request = self.request
        assert request.scored_from is not None
        seconds = (self._finished or time.perf_counter()) - self._added
        return ScoreOutput(
            index=index,
            text=self.text,
            token_ids=request.scored_tokens(request.scored_from, request.prompt_length + 1),
            logprobs=self._logprobs,
            is_greedy=self._greedy,
            num_prompt_tokens=request.scored_from,
            metrics=RequestMetrics(seconds, seconds, request.preemptions, request.hits, self._arrived),
            error=self.error,
        )


def encode_pair(prompt: str | Sequence[int], continuation: str | Sequence[int], tokenizer: Tokenizer) -> Pair:
    """The ids of a prompt and of what follows it, cut as lm-eval does: both are encoded as one text, and spaces at the
    prompt's end belong to the continuation. An empty prompt is BOS, or EOS where there is none. Raises ValueError."""
    if isinstance(prompt, str) != isinstance(continuation, str):
        raise RequestError("prompt and continuation must both be text, or both be token ids", "continuation")
    if not isinstance(prompt, str) or not isinstance(continuation, str):
        context = token_ids(prompt, "a prompt must be a string or")
        scored = token_ids(continuation, "a continuation must be a string or", "continuation")
    else:
        kept = prompt.rstrip()
        context = tokenizer.encode(kept) if kept else []
        scored = tokenizer.encode(prompt + continuation, add_special_tokens=bool(kept))[len(context) :]
    if not context:
        first = prefix_token_id(tokenizer)
        context, scored = ([first], scored) if scored[:1] != [first] else (scored[:1], scored[1:])
    if not scored:
        raise RequestError(
            f"the continuation {continuation!r:.60} adds no token to the prompt: there is nothing to score",
            "continuation",
        )
    return context, scored


def encode_text(text: str | Sequence[int], tokenizer: Tokenizer) -> Pair:
    """The ids of a text that is scored on its own: all but the first, which nothing comes before (BOS where the
    tokenizer puts one, so that all of the text is scored). Raises ValueError."""
    ids = text_ids(text, tokenizer)
    if len(ids) < 2:
        raise RequestError(
            f"the text has {len(ids)} tokens: a token is scored given those before it, so there must be 2; "
            "loglikelihood_rolling scores the first one too",
            "text",
        )
    return ids[:1], ids[1:]


def text_ids(text: str | Sequence[int], tokenizer: Tokenizer, add_special_tokens: bool = True) -> list[int]:
    """The ids of a text that is given as such or as ids. Raises ValueError."""
    if isinstance(text, str):
        return tokenizer.encode(text, add_special_tokens)
    return token_ids(text, "a text must be a string or", "text")


def rolling_windows(ids: Sequence[int], first: int, length: int) -> Iterator[Pair]:
    """Cuts a text so that each token is scored once, in windows that fit: lm-eval's `loglikelihood_rolling`.

    ids: the text's, without special tokens; `first` stands before it. length: most tokens that the model sees. All but
    the last window are full and follow each other; the last one reaches back for as much context as fits.
    """
    for start in range(0, len(ids), length):
        end = min(start + length, len(ids))
        if start == 0:
            yield [first], list(ids[:end])
        else:
            yield list(ids[end - length - 1 : start]), list(ids[start:end])


def join_windows(index: int, text: str | None, parts: Sequence[ScoreOutput]) -> ScoreOutput:
    """The output of a text that was scored in windows."""
    return dataclasses.replace(
        parts[0],
        index=index,
        text=text,
        token_ids=[token for part in parts for token in part.token_ids],
        logprobs=[logprob for part in parts for logprob in part.logprobs],
        is_greedy=all(part.is_greedy for part in parts),
        error=next((part.error for part in parts if part.error is not None), None),
    )


def prefix_token_id(tokenizer: Tokenizer) -> int:
    """What stands before a text that nothing comes before: BOS, or else EOS. Raises ValueError if there is neither."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    tokenizer.require("an empty prompt", "begin it with a token id", "prompt")
    raise UnsupportedError(
        f"{tokenizer.folder}: the tokenizer has neither BOS nor EOS to put before an empty prompt", "prompt"
    )
