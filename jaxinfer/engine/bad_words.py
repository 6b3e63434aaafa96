"""Words that must not be written."""

from __future__ import annotations

from collections.abc import Sequence

from jaxinfer.text.base import Tokenizer


class BadWords:
    """`SamplingParams.bad_words` as token sequences, each word with and without a space before it (as vLLM does).

    The last token of a sequence is forbidden where the ones before it have just been written.
    """

    def __init__(self, words: Sequence[str], tokenizer: Tokenizer):
        spelled = {
            tuple(tokenizer.encode(prefix + word.lstrip(), add_special_tokens=False))
            for word in words
            for prefix in ("", " ")
        }
        spelled.discard(())
        self.single = [ids[0] for ids in spelled if len(ids) == 1]
        self.sequences = [ids for ids in spelled if len(ids) > 1]

    def forbidden(self, output: Sequence[int]) -> list[int]:
        """The tokens that may not come next."""
        ends = [ids[-1] for ids in self.sequences if tuple(output[-(len(ids) - 1) :]) == ids[:-1]]
        return self.single + ends
