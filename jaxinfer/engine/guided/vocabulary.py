"""A tokenizer as llguidance wants it: the bytes of every token, and how text inside a text is split."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from jaxinfer.errors import UnsupportedError
from jaxinfer.text.base import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLTokenizer

_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, of random bits: sums with its powers tell rows of small numbers apart
LONGEST_SPLIT = 1024  # bytes
CUT = 8  # tokens: what follows might have changed them


class Vocabulary:
    """Of a model with `size` tokens, those that the tokenizer doesn't know among them: they never come.

    Raises UnsupportedError where a token's text depends on its neighbours.
    """

    def __init__(self, tokenizer: Tokenizer, size: int, eos_token_ids: Sequence[int]):
        tokenizer.require("structured_outputs", "leave it out", "structured_outputs")
        if tokenizer.cleans_up or (tokenizer.looks_ahead and tokenizer.token_bytes is None):
            raise UnsupportedError(
                f"structured_outputs: {tokenizer.folder}: a token of this tokenizer has no text of its own, so no "
                "grammar can be followed token by token",
                "structured_outputs",
            )
        self.size = size
        self.special_ids = tokenizer.special_ids | frozenset(eos_token_ids)
        # One more, which is no token: where a model has no EOS, or for what ends a text that has none.
        self.eos_token_ids = (*eos_token_ids, size)
        self.tokens = [*tokenizer.all_bytes(size), b""]
        self._tokenizer = tokenizer
        self._ids = {token: i for i, token in enumerate(self.tokens) if token and i not in self.special_ids}
        self._longest = max(map(len, self._ids), default=0)

    @property
    def special(self) -> dict[str, int]:
        """The special tokens that may be in a text, by how they are written."""
        return {self.tokens[i].decode(errors="replace"): i for i in self.special_ids - {*self.eos_token_ids, self.size}}

    @property
    def spells_all(self) -> bool:
        """Whether it has all bytes, so that every text can be written in it."""
        return all(bytes([byte]) in self._ids for byte in range(256))

    def spells(self, text: bytes) -> bool:
        """Whether some tokens make this text."""
        ends = {0}
        for start in range(len(text)):
            if start in ends:
                most = min(self._longest, len(text) - start)
                ends |= {start + n for n in range(1, most + 1) if text[start : start + n] in self._ids}
        return len(text) in ends

    def split(self, text: str | bytes) -> list[int]:
        """The tokens of a text that follows another one: the tokenizer's own, or else the longest ones. Of a long text
        only the first: at each step llguidance asks for all that a grammar leaves no choice of."""
        data = text.encode() if isinstance(text, str) else text
        if len(data) > LONGEST_SPLIT:
            start = data[:LONGEST_SPLIT].decode(errors="ignore").encode()  # whole characters
            return self.split(start)[:-CUT]
        try:
            ids = self._tokenizer.encode_text(data.decode(), add_special_tokens=False)
        except UnicodeDecodeError:
            ids = []
        if not self.special_ids.intersection(ids) and b"".join(self.tokens[i] for i in ids) == data:
            return ids
        ids, at = [], 0
        while at < len(data):
            sizes = range(min(self._longest, len(data) - at), 0, -1)
            token = next((data[at : at + n] for n in sizes if data[at : at + n] in self._ids), None)
            if token is None:
                return []
            ids.append(self._ids[token])
            at += len(token)
        return ids

    @cached_property
    def is_special(self) -> np.ndarray:
        """bool[size]."""
        special = np.zeros(self.size, bool)
        special[[i for i in self.special_ids if i < self.size]] = True
        return special

    @cached_property
    def by_length(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """Ids of tokens that have text, the shortest first, and the 0th, 1st, ... bytes of those that have one."""
        own = enumerate(self.tokens[: self.size])
        ids = sorted((i for i, token in own if token and i not in self.special_ids), key=lambda i: len(self.tokens[i]))
        tokens, columns = [self.tokens[i] for i in ids], []
        for at in range(len(tokens[-1]) if tokens else 0):
            tokens = [token for token in tokens if len(token) > at]
            columns.append(np.array([token[at] for token in tokens], np.uint8))
        return np.array(ids, np.int64), columns

    def spellings(self, kinds: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """Where bytes are of these kinds, u16[256], 0 for those that never come: which spelling each token has,
        i32[size], 0 for those that never come; and the kinds of the 0th, 1st, ... bytes of the spellings that have one,
        the last ones: the longest are the last."""
        ids, columns = self.by_length
        sums, alive = np.zeros(len(ids), np.uint64), np.ones(len(ids), bool)
        for column in columns:
            part, own = slice(len(ids) - len(column), None), kinds[column]
            sums[part] = sums[part] * _FACTOR + own
            alive[part] &= own > 0
        (there,) = np.nonzero(alive)
        _, first, inverse = np.unique(sums[there], return_index=True, return_inverse=True)
        order = np.argsort(first)
        spelling = np.zeros(self.size, np.int32)
        spelling[ids[there]] = (np.argsort(order) + 1)[inverse]
        at = there[first[order]]
        skipped = [len(ids) - len(column) for column in columns]
        own = [kinds[column[at[at >= skip] - skip]] for column, skip in zip(columns, skipped, strict=True)]
        return spelling, [column for column in own if len(column)]

    def for_llguidance(self) -> LLTokenizer:
        """As llguidance has it. It takes about a second for a vocabulary of 100,000."""
        from llguidance import LLTokenizer

        return LLTokenizer(_Wrapper(self), n_vocab=self.size + 1, eos_token=list(self.eos_token_ids))  # type: ignore[arg-type]


class _Wrapper:
    """What LLTokenizer reads."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary):
        self.eos_token_id = vocabulary.eos_token_ids[0]
        self.tokens = vocabulary.tokens
        self.special_token_ids = sorted(vocabulary.special_ids | {vocabulary.size})
        self._split = vocabulary.split

    def __call__(self, text: str | bytes) -> list[int]:
        return self._split(text)
