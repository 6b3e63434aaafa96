"""What a tokenizer does: text to token ids and back, whatever files it comes in.

`tokenizer.json` goes through `tokenizers`, `tokenizer.model` through `sentencepiece`, and what came before them through
transformers, which takes a second to import and is left alone otherwise. torch is never needed.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxinfer.errors import RequestError, UnsupportedError
from jaxinfer.text.chat import ChatTemplates, Tool
from jaxinfer.text.encoding import Encoding, Part, Slot, Truncation, framed
from jaxinfer.text.files import model_token_id

__all__ = ["CLEAN_UP", "NoTokenizer", "Tokenizer"]


# `clean_up_tokenization_spaces` of Hugging Face tokenizers: these replacements, in this order, over the whole text.
CLEAN_UP = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


class Tokenizer(ABC):
    """One interface over all backends. `load_tokenizer` makes one.

    vocab_size: the largest id that the tokenizer can produce or knows, plus one.
    bos_token_id, eos_token_id: None where there is none.
    special_ids: ids that `decode` leaves out by default (BOS, EOS, chat markers, ...).
    cleans_up: whether `decode` does what CLEAN_UP says.
    missing: why there is none: see NoTokenizer.

    How the detokenizer may work piece by piece (`jaxinfer.text.detokenize`):

    token_bytes: id -> the bytes it stands for, where text is exactly those bytes joined; else None.
    byte_errors: what becomes of those that are no character: "replace" or "ignore", as in `bytes.decode`.
    byte_values: id -> byte, for ids that stand for one byte each (byte fallback): neighbours make a character.
    known_ids: ids that a token has: there may be far fewer than vocab_size, and others give no text.
    looks_ahead: a token's text can depend on others in further ways, or it isn't known that it does not.
    """

    vocab_size: int
    bos_token_id: int | None
    eos_token_id: int | None
    special_ids: frozenset[int]
    cleans_up: bool = False
    token_bytes: Callable[[int], bytes] | None = None
    byte_errors: str = "replace"
    byte_values: Mapping[int, int] = {}
    known_ids: frozenset[int]
    looks_ahead: bool = False
    missing: str | None = None

    def __init__(self, folder: Path, chat_templates: ChatTemplates) -> None:
        self.folder = folder
        self.chat_templates = chat_templates
        self.middle_text: dict[int, str] = {}  # what `token_text` has said
        self._frames: dict[tuple[int, bool], list[Slot]] = {}

    @abstractmethod
    def encode_text(self, text: str, add_special_tokens: bool) -> list[int]:
        """`encode` for text known to be valid Unicode."""

    @abstractmethod
    def make_frame(self, texts: int, add_special_tokens: bool) -> list[Slot]:
        """What stands around one text or two in a model's input, and their places."""

    def part(self, text: str) -> Part:
        """A text alone, as tokens that say where they are from, if they can."""
        return Part(self.encode_text(text, add_special_tokens=False))

    @abstractmethod
    def decode_raw(self, ids: list[int]) -> str:
        """All of `ids` as text, special tokens included, without the clean-up. Unknown ids give no text."""

    def token_id(self, token: str) -> int | None:
        """The id of what is one token of the vocabulary, in its own spelling; None: there is none."""
        return None

    def require(self, what: str, instead: str, param: str | None = None) -> None:
        """Raises UnsupportedError where there is no tokenizer for `what`; `instead` is what to do then."""
        if self.missing is not None:
            raise UnsupportedError(
                f"{what}: needs a tokenizer, and {self.missing}; {instead}, or load with tokenizer=PATH", param
            )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`; special tokens written in it are recognized.

        `add_special_tokens` puts BOS (and whatever else the checkpoint asks for) around it. Raises RequestError for
        what is not text.
        """
        if not isinstance(text, str):
            raise RequestError.at(
                "prompt", f"expected a string, found {type(text).__name__}; pass ids as prompt_token_ids"
            )
        _check_unicode(text)
        return self.encode_text(text, add_special_tokens)

    def encoding(
        self,
        first: str | Sequence[int],
        second: str | Sequence[int] | None = None,
        truncation: Truncation | None = None,
        add_special_tokens: bool | None = None,
    ) -> Encoding:
        """A text or a pair as a model's input, with all that is known of its tokens; what doesn't fit is cut off.

        Texts may also be given as ids. Special tokens are put around, except around ids that come alone, which are
        taken for the whole input. Raises RequestError.
        """
        return next(self.windows(first, second, truncation, add_special_tokens))

    def windows(
        self,
        first: str | Sequence[int],
        second: str | Sequence[int] | None = None,
        truncation: Truncation | None = None,
        add_special_tokens: bool | None = None,
    ) -> Iterator[Encoding]:
        """`encoding`, and then what it cut off, as further inputs like it: windows of the text that is too long, of
        which each begins with `truncation.stride` tokens of the one before. (Of a pair that is cut longest_first there
        is only one.)"""
        texts = [first] if second is None else [first, second]
        if add_special_tokens is None:
            add_special_tokens = len(texts) == 2 or isinstance(first, str)
        parts = []
        for text in texts:
            if isinstance(text, str):
                _check_unicode(text)
            parts.append(self.part(text) if isinstance(text, str) else Part(list(text)))
        key = len(texts), add_special_tokens
        if key not in self._frames:
            self._frames[key] = self.make_frame(*key)
        return framed(self._frames[key], parts, truncation)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`. Ids that the tokenizer doesn't know (a padded vocabulary) give no text.

        Raises ValueError for a negative id.
        """
        kept = [int(i) for i in ids]
        if kept and min(kept) < 0:
            raise ValueError(f"token ids: {min(kept)} is negative; ids are 0 to {self.vocab_size - 1}")
        if skip_special_tokens:
            kept = [i for i in kept if i not in self.special_ids]
        text = self.decode_raw(kept)
        if self.cleans_up:
            for old, new in CLEAN_UP:
                text = text.replace(old, new)
        return text

    @cached_property
    def longest_text(self) -> int:
        """Characters of the longest token's text."""
        return max((len(self.token_text(token_id)) for token_id in self.known_ids), default=0)

    @cached_property
    def anchor(self) -> tuple[int, str] | None:
        """An id and its text, after which tokens read as they do anywhere inside a text. None if there isn't one."""
        for token_id in sorted(self.known_ids):
            if token_id in self.byte_values or token_id in self.special_ids:
                continue
            text = self.decode_raw([token_id])
            if text.strip() == text != "" and self.decode_raw([token_id, token_id]).startswith(text):
                return token_id, text
        return None

    def token_text(self, token_id: int) -> str:
        """What one token adds inside a text, the space before it too; special tokens as they are written."""
        text = self.middle_text.get(token_id)
        if text is None:
            before, shown = ([], "") if self.anchor is None else ([self.anchor[0]], self.anchor[1])
            text = self.middle_text[token_id] = self.decode_raw([*before, token_id])[len(shown) :]
        return text

    def all_bytes(self, size: int) -> list[bytes]:
        """What each of `size` ids adds inside a text, as bytes; nothing where it has no token. Not exact where the
        tokenizer looks ahead or cleans up."""
        table = [b""] * size
        for token_id in self.known_ids:
            if token_id >= size:
                continue
            if self.token_bytes is not None:
                table[token_id] = self.token_bytes(token_id)
            elif token_id in self.byte_values:
                table[token_id] = bytes((self.byte_values[token_id],))
            else:
                table[token_id] = self.token_text(token_id).encode()
        return table

    @property
    def has_chat_template(self) -> bool:
        return bool(self.chat_templates.templates)

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Tool] | None = None,
        add_generation_prompt: bool | None = None,
        chat_template: str | None = None,
        continue_final_message: bool | str = False,
        **template_kwargs: Any,
    ) -> str:
        """The conversation as one prompt, by the checkpoint's chat template. See `ChatTemplates.render`."""
        return self.chat_templates.render(
            messages, tools, add_generation_prompt, chat_template, continue_final_message, **template_kwargs
        )

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Tool] | None = None,
        add_generation_prompt: bool | None = None,
        **template_kwargs: Any,
    ) -> list[int]:
        """The ids of `chat_prompt(...)`. The template writes BOS itself, so none is added."""
        prompt = self.chat_prompt(messages, tools, add_generation_prompt, **template_kwargs)
        return self.encode(prompt, add_special_tokens=False)


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        where = f"U+{ord(text[error.start]):04X} at character {error.start}"
        problem = f"not valid Unicode ({where} is half of a surrogate pair); fix the text"
        raise RequestError.at("prompt", problem) from None


class NoTokenizer(Tokenizer):
    """In place of one: token ids give no text, and what needs a tokenizer raises UnsupportedError that says why it is
    `missing`."""

    vocab_size = 0
    special_ids = frozenset()
    known_ids = frozenset()

    def __init__(self, folder: Path, missing: str) -> None:
        super().__init__(folder, ChatTemplates(folder))
        self.missing = missing
        self.bos_token_id = model_token_id(folder, "bos_token_id")
        self.eos_token_id = model_token_id(folder, "eos_token_id")

    def encode_text(self, text: str, add_special_tokens: bool) -> list[int]:
        self.require("text", "give token ids", "prompt")
        return []

    def make_frame(self, texts: int, add_special_tokens: bool) -> list[Slot]:
        if add_special_tokens:
            self.require("special tokens", "give whole inputs as token ids", "add_special_tokens")
        return [Slot(i, 0, i) for i in range(texts)]

    def decode_raw(self, ids: list[int]) -> str:
        return ""

    def chat_prompt(self, *args: Any, **kwargs: Any) -> str:
        self.require("chat", "give a prompt's token ids", "messages")
        return ""
