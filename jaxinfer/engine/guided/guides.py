"""All grammars of an engine, and what is asked of llguidance for several sequences at once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxinfer.engine.guided.grammar import grammar_of, refusal
from jaxinfer.engine.guided.guide import Grammar, Guide
from jaxinfer.engine.guided.large_stack import on_large_stack
from jaxinfer.engine.guided.states import table_of
from jaxinfer.engine.guided.tables import GrammarTable
from jaxinfer.engine.guided.vocabulary import Vocabulary
from jaxinfer.sampling.params import SamplingParams
from jaxinfer.sampling.structured import StructuredOutputsParams
from jaxinfer.text.base import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLTokenizer

KEPT = 128  # grammars that are understood already, the latest ones; and tables
TABLE_BYTES = 2**26  # of all of these together


class Guides:
    """All of an engine. The tokenizer is read when the first grammar comes, or by `prepare`. Any thread may use it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]):
        self._tokenizer, self._size, self._eos = tokenizer, vocab_size, tuple(eos_token_ids)
        self._lock = threading.Lock()
        self._vocabulary: Vocabulary | None = None
        self._theirs: LLTokenizer
        self._executor: LLExecutor
        self._known: OrderedDict[StructuredOutputsParams, Grammar] = OrderedDict()
        # By what may end a text, too.
        self._tables: OrderedDict[tuple[StructuredOutputsParams, tuple[int, ...]], GrammarTable | None] = OrderedDict()

    def prepare(self) -> Vocabulary:
        """Reads the tokenizer. Raises UnsupportedError where no grammar can be followed."""
        with self._lock:
            if self._vocabulary is None:
                from llguidance import LLExecutor

                vocabulary = Vocabulary(self._tokenizer, self._size, self._eos)
                self._theirs, self._executor = vocabulary.for_llguidance(), LLExecutor()
                _ = vocabulary.by_length  # or the first table would wait for it
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
        ends = [token for token in stop_ids if token in vocabulary.special_ids]
        table = self._table(asked, Guide(grammar, self._eos, ends), vocabulary)
        return Guide(grammar, self._eos, ends, table, asked.place())

    def _table(self, asked: StructuredOutputsParams, guide: Guide, vocabulary: Vocabulary) -> GrammarTable | None:
        """One of those that are kept, or a new one; None for what can't be one is kept, too."""
        key = asked, tuple(guide.ends)
        with self._lock:
            if key in self._tables:
                self._tables.move_to_end(key)
                return self._tables[key]
        table = table_of(asked, guide, vocabulary, self._masks)
        with self._lock:
            self._tables[key] = table
            while len(self._tables) > KEPT or sum(own.nbytes for own in self._tables.values() if own) > TABLE_BYTES:
                self._tables.popitem(last=False)
        return table

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
        grammar = Grammar(lambda: on_large_stack(lambda: LLMatcher(self._theirs, source, log_level=0, limits=limits)))
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
