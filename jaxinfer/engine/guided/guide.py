"""Where sequences are in their grammars, and which tokens may come there."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxinfer.engine.guided.grammar import one_line
from jaxinfer.engine.guided.tables import BEGIN, GrammarTable
from jaxinfer.errors import RequestError
from jaxinfer.sampling.structured import PARAM

if TYPE_CHECKING:
    from llguidance import LLMatcher

RENEWED_IN = 0.02  # seconds: what takes longer is not understood anew while others wait
RENEWED_EVERY = 16  # tokens
SLOW_SECONDS = 0.25  # of the engine's thread that one sequence may take before it is asked how much that is a token
TOKEN_SECONDS = 0.002  # that each may take then, on average: an ambiguous grammar takes more with every token


class Grammar:
    """One that is understood. make: does that. matcher: at its beginning; its copies share what they have found out of
    the grammar, and the limits of that: where one has reached them, all have."""

    def __init__(self, make: Callable[[], LLMatcher]):
        start = time.perf_counter()
        self.matcher = make()
        self.seconds = time.perf_counter() - start
        self._make = make

    def renewed(self, spent: LLMatcher) -> LLMatcher:
        """Another one than that, which has reached its limits."""
        if self.matcher is spent:
            self.matcher = self._make()
        return self.matcher


class Guide:
    """One sequence's place in its grammar.

    complete: the text is, and nothing can follow.
    error: why nothing can be said any more.
    ends: ids that may end a text that is complete; the others of `eos` may not.
    table: for the device, if the grammar has one. state: where in it.
    place: what errors call the grammar.
    """

    def __init__(
        self,
        grammar: Grammar,
        eos: Sequence[int],
        ends: Sequence[int],
        table: GrammarTable | None = None,
        place: str = PARAM,
    ):
        self.complete = False
        self.error: str | None = None
        self.table, self.state = table, BEGIN
        self.eos, self.ends, self.place = eos, ends, place
        self._grammar, self._origin = grammar, grammar.matcher
        self.matcher = self._origin.deep_copy()
        self._tokens: list[int] = []
        self._seconds = 0.0
        self._renewed = -RENEWED_EVERY  # after how many tokens

    def anew(self) -> Guide:
        """The same for another sequence, from the beginning."""
        return Guide(self._grammar, self.eos, self.ends, self.table, self.place)

    def after(self, token: int) -> Guide:
        """Another one, for the same tokens and this one."""
        other = Guide(self._grammar, self.eos, self.ends)
        other.matcher, other._tokens = self.matcher.deep_copy(), self._tokens.copy()
        other.accept([token])
        return other

    def accept(self, tokens: Sequence[int]) -> None:
        """The next ones."""
        self._tokens += tokens
        start = time.thread_time()
        self.matcher.consume_tokens(list(tokens))
        self._check()
        self._seconds += time.thread_time() - start
        if self.error is None and self._seconds > max(SLOW_SECONDS, TOKEN_SECONDS * len(self._tokens)):
            each = 1000 * self._seconds / len(self._tokens)
            self.error = (
                f"{self.place}: the grammar takes {each:.0f} ms a token on average, and {1000 * TOKEN_SECONDS:.0f} are "
                "allowed: it is ambiguous, write it with fewer ways to read a text"
            )
        self.complete = self.error is None and self.matcher.is_stopped()
        if self.table is not None:
            for token in tokens:
                self.state = self.table.after(self.state, token)

    def forced(self) -> list[int]:
        """The next tokens, as far as there is no choice."""
        return self.matcher.compute_ff_tokens()

    def ends_with(self, tokens: Sequence[int]) -> bool:
        """Whether the text is complete after these, and nothing can follow."""
        after = self.matcher.deep_copy()
        return after.consume_tokens(list(tokens)) and after.is_stopped() and not after.is_error()

    def check_first(self, allowed: np.ndarray) -> None:
        """Raises RequestError where the tokens that other parameters allow, u32[V/32], are none of the first ones."""
        words = np.frombuffer(self.matcher.compute_bitmask(), np.uint32).copy()
        self.finish_mask(words)
        if not (words[: len(allowed)] & allowed).any():
            problem = f"{self.place} and the other sampling parameters leave no token to begin with"
            raise RequestError(problem, self.place.partition(".")[0])

    def finish_mask(self, words: np.ndarray) -> None:
        """What llguidance has said, u32[V/32 or more], with what may end this text."""
        if self._check():
            words[:] = np.frombuffer(self.matcher.compute_bitmask(), np.uint32)
        self._check()
        if self.error is not None:
            words[:] = 0
            return
        may_end = self.matcher.is_accepting()
        others = [token for token in self.eos if token not in self.ends]
        before = words.copy() if others else words
        for token in others:
            words[token >> 5] &= ~np.uint32(1 << (token & 31))
        if others and not words.any():
            words[:] = before  # an EOS that is ignored, where there is nothing else
        for token in self.ends if may_end else ():
            words[token >> 5] |= np.uint32(1 << (token & 31))

    def _check(self) -> bool:
        """Notes an error, if there is one. True where a limit was reached and the same place is found without."""
        if not self.matcher.is_error():
            return False
        error = one_line(self.matcher.get_error())
        if self._grammar.seconds < RENEWED_IN and len(self._tokens) >= self._renewed + RENEWED_EVERY:
            self._renewed, self._origin = len(self._tokens), self._grammar.renewed(self._origin)
            self.matcher = self._origin.deep_copy()
            if self.matcher.consume_tokens(self._tokens):
                return True
        self.error = f"{self.place}: {error}"
        return False
