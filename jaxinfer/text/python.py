"""Tokenizers that transformers has in Python only: Marian's and ByT5's."""

from __future__ import annotations

from typing import Any

from jaxinfer.text.base import Tokenizer
from jaxinfer.text.chat import load_chat_templates
from jaxinfer.text.encoding import Slot
from jaxinfer.text.files import TokenFiles

__all__ = ["PythonTokenizer"]


class PythonTokenizer(Tokenizer):
    """Around `theirs`, a transformers.PreTrainedTokenizer. It doesn't tell where tokens are from, and the models don't
    tell the texts of a pair apart."""

    def __init__(self, files: TokenFiles, theirs: Any) -> None:
        super().__init__(files.folder, load_chat_templates(files.folder, files.config, files.named))
        self._theirs = theirs
        vocabulary = theirs.get_vocab()
        self.special_ids = frozenset(theirs.all_special_ids)
        self.known_ids = frozenset(vocabulary.values())
        self.vocab_size = max(self.known_ids, default=-1) + 1
        self.bos_token_id, self.eos_token_id = theirs.bos_token_id, theirs.eos_token_id
        self.cleans_up = files.flag("clean_up_tokenization_spaces", False)
        if type(theirs).__name__ == "ByT5Tokenizer":
            added = {i: token.content.encode() for i, token in theirs.added_tokens_decoder.items()}
            table = {i: added.get(i) or bytes([i - theirs.offset]) for i in self.known_ids}
            self.token_bytes, self.byte_errors = table.__getitem__, "ignore"
        else:
            self.looks_ahead = True

    def encode_text(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._theirs.encode(text, add_special_tokens=add_special_tokens, verbose=False)
        return ids

    def make_frame(self, texts: int, add_special_tokens: bool) -> list[Slot]:
        samples = sorted(self.known_ids - self.special_ids)[:texts]
        parts = [[token_id] for token_id in samples]
        ids = self._theirs.build_inputs_with_special_tokens(*parts) if add_special_tokens else samples
        places = [samples.index(token_id) if token_id in samples else None for token_id in ids]
        return [Slot(place, token_id, 0) for place, token_id in zip(places, ids, strict=True)]

    def decode_raw(self, ids: list[int]) -> str:
        known = [token_id for token_id in ids if token_id in self.known_ids]
        return self._theirs.decode(known, skip_special_tokens=False, clean_up_tokenization_spaces=False)
