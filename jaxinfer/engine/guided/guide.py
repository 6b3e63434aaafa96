"""Where sequences are in their grammars, and which tokens may come there."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxinfer.engine.guided.grammar import grammar_of, one_line, refusal
from jaxinfer.engine.guided.tables import BEGIN, GrammarTable, table_of
from jaxinfer.engine.guided.vocabulary import Vocabulary
from jaxinfer.errors import RequestError
from jaxinfer.sampling.params import SamplingParams
from jaxinfer.sampling.structured import PARAM, StructuredOutputsParams
from jaxinfer.text.base import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

KEPT = 128  # grammars that are understood already, the latest ones
RENEWED_IN = 0.02  # seconds: what takes longer is not understood anew while others wait
RENEWED_EVERY = 16  # tokens


class Grammar:
    """One that is understood. make: does that. matcher: at its beginning; its copies share what they have found out of
    the grammar, and the limits of that: where one has reached them, all have."""

    def __init__(self, make: Callable[[], LLMatcher]):
        start = time.perf_counter()
        self.matcher = make()
        self.seconds = time.perf_counter() - start
        self.tables: dict[Sequence[Sequence[int]], GrammarTable | None] = {}  # by what may end a text
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
    """

    def __init__(self, grammar: Grammar, eos: Sequence[int], ends: Sequence[int], table: GrammarTable | None = None):
        self.complete = False
        self.error: str | None = None
        self.table, self.state = table, BEGIN
        self.eos, self.ends = eos, ends
        self._grammar, self._origin = grammar, grammar.matcher
        self.matcher = self._origin.deep_copy()
        self._tokens: list[int] = []
        self._renewed = -RENEWED_EVERY  # after how many tokens

    def anew(self) -> Guide:
        """The same for another sequence, from the beginning."""
        return Guide(self._grammar, self.eos, self.ends, self.table)

    def after(self, token: int) -> Guide:
        """Another one, for the same tokens and this one."""
        other = Guide(self._grammar, self.eos, self.ends)
        other.matcher, other._tokens = self.matcher.deep_copy(), self._tokens.copy()
        other.accept([token])
        return other

    def accept(self, tokens: Sequence[int]) -> None:
        """The next ones."""
        self._tokens += tokens
        self.matcher.consume_tokens(list(tokens))
        self._check()
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
            raise RequestError(f"{PARAM} and the other sampling parameters leave no token to begin with", PARAM)

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
        self.error = f"{PARAM}: {error}"
        return False


class Guides:
    """All of an engine. The tokenizer is read when the first grammar comes, or by `prepare`. Any thread may use it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]):
        self._tokenizer, self._size, self._eos = tokenizer, vocab_size, tuple(eos_token_ids)
        self._lock = threading.Lock()
        self._vocabulary: Vocabulary | None = None
        self._theirs: LLTokenizer
        self._executor: LLExecutor
        self._known: OrderedDict[StructuredOutputsParams, Grammar] = OrderedDict()

    def prepare(self) -> Vocabulary:
        """Reads the tokenizer. Raises UnsupportedError where no grammar can be followed."""
        with self._lock:
            if self._vocabulary is None:
                from llguidance import LLExecutor

                vocabulary = Vocabulary(self._tokenizer, self._size, self._eos)
                self._theirs, self._executor = vocabulary.for_llguidance(), LLExecutor()
                self._vocabulary = vocabulary
        return self._vocabulary

    def guide(self, params: SamplingParams, stop_ids: Sequence[int]) -> Guide | None:
        """A guide at the beginning; None where nothing is asked for. Raises RequestError for what can't be followed,
        and for what other parameters leave nothing of."""
        asked = params.structured_outputs
        if asked is None:
            return None
        assert isinstance(asked, StructuredOutputsParams)
        vocabulary = self.prepare()
        grammar = self._grammar(asked, vocabulary)
        # Ids that end a text, and are no text themselves; those that are come where the grammar has them.
        ends = tuple(token for token in stop_ids if token in vocabulary.special_ids)
        if ends not in grammar.tables:
            grammar.tables[ends] = table_of(asked, Guide(grammar, self._eos, ends), vocabulary, self._masks)
        return Guide(grammar, self._eos, ends, grammar.tables[ends])

    def _masks(self, guides: Sequence[Guide]) -> np.ndarray:
        """u32[R, V/32]."""
        masks = np.zeros((len(guides), -(-self._size // 32)), np.uint32)
        self.fill([(guide, row) for row, guide in enumerate(guides)], masks)
        return masks

    def fill(self, guides: Sequence[tuple[Guide, int]], masks: np.ndarray) -> None:
        """Bits of the tokens that may come next: of each guide into its row of u32[R, V/32]."""
        if not guides:
            return
        words = np.zeros((len(guides), -(-(self._size + 1) // 32)), np.uint32)
        matchers = [(guide.matcher, i) for i, (guide, _) in enumerate(guides)]
        self._executor.unsafe_compute_mask_ptr(matchers, words.ctypes.data, words.shape[1] * 4, len(guides))
        for (guide, row), mask in zip(guides, words, strict=True):
            guide.finish_mask(mask)
            masks[row] = mask[: masks.shape[1]]

    def _grammar(self, asked: StructuredOutputsParams, vocabulary: Vocabulary) -> Grammar:
        """One of those that are kept, or a new one."""
        with self._lock:
            if asked in self._known:
                self._known.move_to_end(asked)
                return self._known[asked]
        from llguidance import LLMatcher, LLParserLimits

        source, limits = grammar_of(asked, vocabulary.special), LLParserLimits(verbose_errors=False)
        grammar = Grammar(lambda: LLMatcher(self._theirs, source, log_level=0, limits=limits))
        matcher = grammar.matcher.deep_copy()
        if matcher.is_error():
            raise refusal(asked, matcher.get_error())
        if not vocabulary.spells_all:
            for text in asked.choice or ():
                if not vocabulary.spells(text.encode()):
                    raise refusal(asked, f"{text!r:.60} can't be written in the tokens of this model")
        first = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        if matcher.is_error() or not first.any():
            raise refusal(asked, "no text matches it")
        with self._lock:
            self._known[asked] = grammar
            while len(self._known) > KEPT:
                self._known.popitem(last=False)
        return grammar
