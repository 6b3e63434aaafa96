"""What `\\d` is in a regular expression beyond ASCII: the decimal digits of llguidance's version of Unicode."""

from __future__ import annotations

import functools

Ranges = tuple[tuple[int, int], ...]  # of bytes, both ends included
Tree = tuple[tuple[Ranges, "Tree"], ...]  # of characters in UTF-8: bytes, and what may follow them, or nothing


@functools.cache
def digits() -> Tree:
    """All of them."""
    from llguidance import LLMatcher, LLTokenizer

    tokenizer = LLTokenizer(_Bytes(), n_vocab=257, eos_token=[256])  # type: ignore[arg-type]

    def after(matcher: LLMatcher, first: int) -> Tree:
        bits, found = matcher.compute_bitmask(), dict[Tree, list[int]]()
        for byte in (byte for byte in range(first, 256) if bits[byte >> 3] >> (byte & 7) & 1):
            then = matcher.deep_copy()
            then.consume_token(byte)
            found.setdefault(() if then.is_accepting() else after(then, 0), []).append(byte)
        return tuple((tuple((byte, byte) for byte in own), rest) for rest, own in found.items())

    return after(LLMatcher(tokenizer, LLMatcher.grammar_from_regex(r"\d"), log_level=0), 128)


class _Bytes:
    """A tokenizer of bytes, as LLTokenizer reads it."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    eos_token_id = 256
    tokens = (*(bytes([byte]) for byte in range(256)), b"")
    special_token_ids = (256,)

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)
