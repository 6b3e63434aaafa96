"""Tokens that may not come next because of those before them, which the host sees to."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Collection, Sequence

from jaxinfer.engine.bad_words import BadWords
from jaxinfer.errors import RequestError
from jaxinfer.sampling.params import SamplingParams
from jaxinfer.text.base import Tokenizer


class Exclusions:
    """Of one sequence with these parameters. always: tokens that never come. follows: whether others depend on the
    tokens so far, so that the host must have seen them all."""

    def __init__(self, params: SamplingParams, words: BadWords, eos_token_ids: Sequence[int], prompt_length: int):
        sequences = set(params.bad_words_ids or ()) - {(eos,) for eos in eos_token_ids}  # transformers lets those end
        self.always = {*(params.suppress_tokens or ()), *words.single, *(ids[0] for ids in sequences if len(ids) == 1)}
        self.follows = bool(words.sequences or params.no_repeat_ngram_size) or any(len(ids) > 1 for ids in sequences)
        self._words = words
        self._sequences = [ids for ids in sequences if len(ids) > 1]
        self._prompt_length = prompt_length
        self._size = params.no_repeat_ngram_size
        self._next: defaultdict[tuple[int, ...], set[int]] = defaultdict(set)  # what has come after so many tokens
        self._read = 0

    def anew(self) -> Exclusions:
        """The same for another continuation of the prompt."""
        other = copy.copy(self)
        other._next, other._read = defaultdict(set), 0
        return other

    def forbidden(self, tokens: Sequence[int]) -> set[int]:
        """What may not follow these tokens, prompt and output, which begin with those of the last call."""
        ends = {ids[-1] for ids in self._sequences if tuple(tokens[-(len(ids) - 1) :]) == ids[:-1]}
        return self.always | ends | set(self._words.forbidden(tokens[self._prompt_length :])) | self._repeats(tokens)

    def _repeats(self, tokens: Sequence[int]) -> set[int]:
        before = self._size - 1
        if before < 0 or len(tokens) < before:
            return set()
        for i in range(max(self._read, before), len(tokens)):
            self._next[tuple(tokens[i - before : i])].add(tokens[i])
        self._read = len(tokens)
        return self._next.get(tuple(tokens[len(tokens) - before :]), set())


def exclusions(
    params: SamplingParams, tokenizer: Tokenizer, eos_token_ids: Sequence[int], prompt_length: int
) -> Exclusions | None:
    """Those of a sequence; None if there are none. Raises ValueError for words that the tokenizer can't spell."""
    if not (params.bad_words or params.bad_words_ids or params.suppress_tokens or params.no_repeat_ngram_size):
        return None
    return Exclusions(params, BadWords(params.bad_words or (), tokenizer), eos_token_ids, prompt_length)


def check_some_left(
    params: SamplingParams, always: Collection[int], stop_ids: Sequence[int], prompt_length: int, vocab_size: int
) -> None:
    """Raises RequestError if parameters that exclude tokens leave none: `always` are excluded beside what is not
    allowed."""
    if not params.has_masks and not params.least(prompt_length):
        return
    names = ["allowed_token_ids", "bad_words", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens"]
    excluded = {*always, *(params.begin_suppress_tokens or ())}
    if params.least(prompt_length):
        names += ["stop_token_ids", "min_tokens", "min_length"]
        excluded |= set(stop_ids)
    allowed = range(vocab_size) if params.allowed_token_ids is None else params.allowed_token_ids
    if all(token in excluded for token in allowed):
        culprits = [name for name in names if getattr(params, name)]
        raise RequestError(
            f"sampling parameters {', '.join(culprits)} leave no token to sample: exclude fewer", culprits[0]
        )
