"""Token ids to text while they come, a piece at a time."""

import codecs
from collections.abc import Iterable, Sequence

from jaxinfer.text.base import CLEAN_UP, Tokenizer

__all__ = ["Detokenizer"]

REPLACEMENT = "\ufffd"  # what stands for bytes that are no character
CONTEXT = 4  # tokens of a prompt's end: a character has at most 4 bytes


class Detokenizer:
    """Releases text as soon as it is certain, and no piece ends inside a character: what `push` and `finish` return,
    joined, is what the ids add to `prompt_ids`. `tokenizer.decode(prompt_ids)` followed by it is
    `tokenizer.decode(prompt_ids and ids)`, with the same `skip_special_tokens`; only a prompt that ends inside of a
    character, or that the clean-up of spaces would have changed, stays as it is. Without a prompt it is
    `tokenizer.decode(ids)`.

    Text depends on neighbouring tokens in three places only, and each has its own small memory here: bytes that
    together make a character, the start of the text (where a leading space is dropped), and the clean-up of spaces
    where a checkpoint asks for it. Everything else is looked up token by token, so the cost of a token is constant.
    What a decoder outside this scheme adds (no generating model's is, as far as known) is the difference between the
    texts of the last few tokens without it and with it.

    In a run of byte tokens each byte that is no part of a character is one U+FFFD, as SentencePiece has it. tokenizers
    makes U+FFFD of all bytes of such a run, so of those before too, which may have been shown long ago.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True, prompt_ids: Sequence[int] = ()) -> None:
        self._known = tokenizer.known_ids
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._parts: list[str] = []
        self._finished = False
        # A decoder's `shown` is what a prompt shows of a character that it has begun: its, not the output's, if no
        # character comes of it.
        self._decoder: _ByteLevel | _Pieces | _Window
        if tokenizer.token_bytes is not None:
            self._decoder = _ByteLevel(tokenizer, self._end(prompt_ids, CONTEXT))
        elif not tokenizer.looks_ahead and tokenizer.anchor is not None:
            end = self._end(prompt_ids, CONTEXT)
            begun = any(tokenizer.token_text(i).strip() for i in end) or bool(end and tokenizer.decode_raw(end))
            if end and not begun:  # a space, perhaps the one that is dropped
                end = self._end(prompt_ids, len(prompt_ids))
                begun = bool(tokenizer.decode_raw(end))
            self._decoder = _Pieces(tokenizer, end, begun)
        else:
            # Its first token may be in the middle of a character.
            end = self._end(prompt_ids, 6 * CONTEXT)
            sizes = (n for n in range(CONTEXT, len(end)) if REPLACEMENT not in tokenizer.decode_raw(end[-n:]))
            self._decoder = _Window(tokenizer, end[-next(sizes, len(end)) :])
        self._shown = self._decoder.shown
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
        if self._shown and text:
            text, self._shown = text.removeprefix(self._shown), ""
        for stage in self._clean_up:
            text = stage.push(text)
        self._parts.append(text)
        return text

    def finish(self) -> str:
        """No more ids come: returns the rest of the text (nothing the second time)."""
        if self._finished:
            return ""
        self._finished = True
        text = self._decoder.finish().removeprefix(self._shown)
        for stage in self._clean_up:
            text = stage.push(text) + stage.finish()
        self._parts.append(text)
        return text

    def _end(self, prompt_ids: Sequence[int], count: int) -> list[int]:
        """The last `count` of the ids that give text."""
        end: list[int] = []
        for token_id in reversed(prompt_ids):
            if len(end) == count:
                break
            if token_id in self._known and token_id not in self._skip:
                end.append(token_id)
        return end[::-1]


def _replace_each(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return REPLACEMENT * (error.end - error.start), error.end


codecs.register_error("jaxinfer.replace_each", _replace_each)


class _ByteLevel:
    """Byte-level BPE: the text is the tokens' bytes, read as UTF-8."""

    def __init__(self, tokenizer: Tokenizer, end: list[int]) -> None:
        assert tokenizer.token_bytes is not None
        self._bytes = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(tokenizer.byte_errors)
        self._utf8.decode(b"".join(map(self._bytes, end)))
        self.shown = self._utf8.getstate()[0].decode(errors=tokenizer.byte_errors)

    def push(self, ids: list[int]) -> str:
        return self._utf8.decode(b"".join(map(self._bytes, ids)))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _Pieces:
    """Pieces of text, possibly with runs of byte tokens between them (SentencePiece, WordPiece, ...)."""

    def __init__(self, tokenizer: Tokenizer, end: list[int], begun: bool) -> None:
        self._tokenizer = tokenizer
        self._byte_values = tokenizer.byte_values
        self._middle = tokenizer.middle_text
        self._start = None if begun else end  # the ids so far while they have given no text
        self._utf8 = codecs.getincrementaldecoder("utf-8")("jaxinfer.replace_each")
        run = next((n for n, i in enumerate(reversed(end)) if i not in self._byte_values), len(end))
        self._utf8.decode(bytes(self._byte_values[i] for i in end[len(end) - run :]))
        begun_character = self._utf8.getstate()[0]
        self._open = bool(begun_character)  # whether a run of bytes may be in the middle of a character
        self.shown = REPLACEMENT * len(begun_character)

    def push(self, ids: list[int]) -> str:
        parts = []
        for token_id in ids:
            byte = self._byte_values.get(token_id)
            if self._start is not None:
                parts.append(self._begin(token_id, byte))
            elif byte is not None:
                parts.append(self._utf8.decode(bytes((byte,))))
                self._open = True
            else:
                if self._open:
                    parts.append(self.finish())
                text = self._middle.get(token_id)
                parts.append(self._tokenizer.token_text(token_id) if text is None else text)
        return "".join(parts)

    def finish(self) -> str:
        self._open = False
        return self._utf8.decode(b"", final=True)

    def _begin(self, token_id: int, byte: int | None) -> str:
        """The text that a token adds at the start of the text."""
        assert self._start is not None
        self._start.append(token_id)
        if byte is None:
            text = self._tokenizer.decode_raw(self._start)
            self.finish()
        else:
            text = self._utf8.decode(bytes((byte,)))
            self._open = True
            if text and REPLACEMENT not in text:
                text = self._tokenizer.decode_raw(self._start)
        if text:
            self._start = None
        return text


class _Window:
    """Any decoder: what a token adds is the difference that it makes to the text of the tokens around it."""

    shown = ""  # what it releases is the difference to that

    def __init__(self, tokenizer: Tokenizer, end: list[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = end  # those before, and since `_done` those whose text is open
        self._done = len(end)
        self._before = tokenizer.decode_raw(end)

    def push(self, ids: list[int]) -> str:
        return "".join(map(self._add, ids))

    def finish(self) -> str:
        return self._added()

    def _add(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._added()
        # More bytes than a character has are none.
        if not text or (text.endswith(REPLACEMENT) and len(self._ids) - self._done <= CONTEXT):
            return ""
        self._ids = self._ids[self._done :]
        self._done = len(self._ids)
        self._before = self._tokenizer.decode_raw(self._ids)
        return text

    def _added(self) -> str:
        text = self._tokenizer.decode_raw(self._ids)
        if not text.startswith(self._before):  # the prompt's last bytes have become a character
            return text[len(self._before.rstrip(REPLACEMENT)) :]
        return text[len(self._before) :]


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
