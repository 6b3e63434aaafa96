"""Token ids to text while they come, a piece at a time."""

import codecs
from collections.abc import Iterable

from jaxinfer.text.tokenizer import CLEAN_UP, Tokenizer

__all__ = ["Detokenizer"]


class Detokenizer:
    """Releases text as soon as it is certain: what `push` and `finish` return, joined, is exactly
    `tokenizer.decode(all ids, skip_special_tokens)`, and no piece ends inside a character.

    Text depends on neighbouring tokens in three places only, and each has its own small memory here: bytes that
    together make a character, the start of the text (where a leading space is dropped), and the clean-up of spaces
    where a checkpoint asks for it. Everything else is looked up token by token, so the cost of a token is constant.
    A decoder outside this scheme (no generating model's is, as far as known) releases its text at `finish`.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._known = tokenizer.known_ids
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._parts: list[str] = []
        self._finished = False
        self._decoder: _ByteLevel | _Pieces | _Whole
        if tokenizer.token_bytes is not None:
            self._decoder = _ByteLevel(tokenizer)
        elif not tokenizer.looks_ahead and tokenizer.anchor is not None:
            self._decoder = _Pieces(tokenizer, *tokenizer.anchor)
        else:
            self._decoder = _Whole(tokenizer)
        self._clean_up = [_Replace(old, new) for old, new in CLEAN_UP] if tokenizer.cleans_up else []

    @property
    def text(self) -> str:
        """Everything released so far."""
        self._parts = ["".join(self._parts)]
        return self._parts[0]

    def push(self, ids: Iterable[int]) -> str:
        """Takes the next ids; returns the text that became certain. Raises ValueError after `finish`."""
        if self._finished:
            raise ValueError("Detokenizer: push after finish; make a new one for each sequence")
        text = self._decoder.push([i for i in map(int, ids) if i in self._known and i not in self._skip])
        for stage in self._clean_up:
            text = stage.push(text)
        self._parts.append(text)
        return text

    def finish(self) -> str:
        """No more ids come: returns the rest of the text (nothing the second time)."""
        if self._finished:
            return ""
        self._finished = True
        text = self._decoder.finish()
        for stage in self._clean_up:
            text = stage.push(text) + stage.finish()
        self._parts.append(text)
        return text


class _ByteLevel:
    """Byte-level BPE: the text is the tokens' bytes, read as UTF-8."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        assert tokenizer.token_bytes is not None
        self._bytes = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: list[int]) -> str:
        return self._utf8.decode(b"".join(map(self._bytes, ids)))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _Pieces:
    """Pieces of text, possibly with runs of byte tokens between them (SentencePiece, WordPiece, ...)."""

    def __init__(self, tokenizer: Tokenizer, anchor: int, anchor_text: str) -> None:
        self._tokenizer = tokenizer
        self._anchor, self._anchor_text = anchor, anchor_text
        self._byte_values = tokenizer.byte_values
        self._middle = tokenizer.middle_text
        self._start: list[int] | None = []  # the ids so far while they have given no text, else None
        self._run: list[int] = []  # byte tokens whose text is open

    def push(self, ids: list[int]) -> str:
        parts = []
        for token_id in ids:
            if token_id in self._byte_values:
                self._run.append(token_id)
                if self._tokenizer.byte_runs_cut and self._whole_characters():
                    parts.append(self._close_run())
                continue
            if self._run:
                parts.append(self._close_run())
            if self._start is not None:
                parts.append(self._decode([token_id]))
                continue
            text = self._middle.get(token_id)
            if text is None:
                text = self._middle[token_id] = self._decode([token_id])
            parts.append(text)
        return "".join(parts)

    def finish(self) -> str:
        return self._close_run() if self._run else ""

    def _close_run(self) -> str:
        run, self._run = self._run, []
        return self._decode(run)

    def _decode(self, ids: list[int]) -> str:
        """The text that `ids` add where the stream stands."""
        if self._start is None:
            return self._tokenizer.decode_raw([self._anchor, *ids])[len(self._anchor_text) :]
        self._start += ids
        text = self._tokenizer.decode_raw(self._start)
        if text:
            self._start = None
        return text

    def _whole_characters(self) -> bool:
        try:
            bytes(self._byte_values[i] for i in self._run).decode()
        except UnicodeDecodeError:
            return False
        return True


class _Whole:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []

    def push(self, ids: list[int]) -> str:
        self._ids += ids
        return ""

    def finish(self) -> str:
        return self._tokenizer.decode_raw(self._ids)


class _Replace:
    """`str.replace(old, new)` over a stream: holds back only what could become the beginning of `old`."""

    def __init__(self, old: str, new: str) -> None:
        self._old, self._new = old, new
        self._held = ""

    def push(self, text: str) -> str:
        if not text:
            return ""
        *done, tail = (self._held + text).split(self._old)
        size = next((n for n in range(len(self._old) - 1, 0, -1) if tail.endswith(self._old[:n])), 0)
        self._held = tail[len(tail) - size :]
        return self._new.join([*done, tail[: len(tail) - size]])

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held
