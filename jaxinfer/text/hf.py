"""`tokenizer.json`, and what else becomes the same object, through the `tokenizers` library."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models

from jaxinfer.errors import UnsupportedError
from jaxinfer.text.base import Tokenizer
from jaxinfer.text.chat import load_chat_templates
from jaxinfer.text.encoding import Part, Slot, frame_of
from jaxinfer.text.files import TokenFiles, one_line

__all__ = ["HFTokenizer", "naming_panics", "read_tokenizer_json"]

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: printable Latin-1 is itself, the rest count up from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


class HFTokenizer(Tokenizer):
    """Around `tokenizer`. What stands around a prompt is its own post-processor's to say, as in transformers 5: the
    `add_bos_token` and `add_eos_token` of a tokenizer_config.json beside a tokenizer.json don't count.

    special: the ids that are special.
    """

    def __init__(self, files: TokenFiles, tokenizer: tokenizers.Tokenizer, special: set[int]) -> None:
        self._tokenizer = tokenizer
        # What was stored there belongs to somebody's training run.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        super().__init__(files.folder, load_chat_templates(files.folder, files.config, files.named))
        self.special_ids = frozenset(special)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.known_ids = frozenset(vocabulary.values())
        self.vocab_size = max(self.known_ids, default=-1) + 1
        ids = {name: self._tokenizer.token_to_id(content) for name, content in files.named.items()}
        self.bos_token_id = ids["bos_token"] if "bos_token" in ids else files.model_token_id("bos_token_id")
        self.eos_token_id = ids["eos_token"] if "eos_token" in ids else files.model_token_id("eos_token_id")
        # The clean-up was made for WordPiece; on BPE it deletes spaces that the model wrote, so there it has to be
        # asked for twice.
        forced = files.flag("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
        is_bpe = isinstance(self._tokenizer.model, models.BPE)
        self.cleans_up = files.flag("clean_up_tokenization_spaces", False) and (forced or not is_bpe)
        self._describe_decoder(vocabulary)

    def encode_text(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def token_id(self, token: str) -> int | None:
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def part(self, text: str) -> Part:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return Part(encoding.ids, encoding.offsets, encoding.word_ids)

    def make_frame(self, texts: int, add_special_tokens: bool) -> list[Slot]:
        second = "a" if texts == 2 else None
        sample = self._tokenizer.encode("a", second, add_special_tokens=add_special_tokens)
        frame = frame_of(sample.ids, sample.type_ids, sample.sequence_ids)
        if [slot.sequence for slot in frame if slot.sequence is not None] != list(range(texts)):
            raise UnsupportedError(f"{self.folder}: the tokenizer has no form for {texts} texts as one input")
        return frame

    def decode_raw(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def _describe_decoder(self, vocabulary: dict[str, int]) -> None:
        """Which of the ways of `Tokenizer` the decoder allows."""
        decoder = self._tokenizer.decoder
        spec: dict[str, Any] = json.loads(decoder.__getstate__()) if decoder is not None else {}
        steps = spec.get("decoders", []) if spec.get("type") == "Sequence" else [spec] if spec else []
        kinds = [step.get("type") for step in steps]
        if kinds and kinds[0] == "ByteLevel" and set(kinds[1:]) <= {"Fuse"}:
            self._bytes: dict[int, bytes] = {}
            self.token_bytes = self._token_bytes
        elif not all(_is_local(step, "Fuse" in kinds[:i]) for i, step in enumerate(steps)):
            self.looks_ahead = True
        elif "ByteFallback" in kinds:
            self.byte_values = {
                i: int(token[3:5], 16) for token, i in vocabulary.items() if _BYTE_TOKEN.fullmatch(token)
            }

    def _token_bytes(self, token_id: int) -> bytes:
        token_bytes = self._bytes.get(token_id)
        if token_bytes is None:
            token = self._tokenizer.id_to_token(token_id) or ""
            stand_ins = [_ALPHABET.get(char) for char in token]
            # A token with a character outside the alphabet stands for its own UTF-8.
            known = [byte for byte in stand_ins if byte is not None]
            token_bytes = bytes(known) if len(known) == len(token) else token.encode()
            self._bytes[token_id] = token_bytes
        return token_bytes


def _is_local(step: dict[str, Any], fused: bool) -> bool:
    """Whether a decoder step treats each token by itself (byte runs and the very start of the text aside)."""
    kind = step.get("type")
    if kind == "Replace":
        pattern = step["pattern"]
        at_start = pattern.get("Regex", "").startswith(r"\A") and not step["content"]
        return not fused or at_start or len(pattern.get("String", "")) == 1
    if kind == "Strip":
        return bool(step["stop"] == 0)
    return kind in ("ByteFallback", "Fuse", "Metaspace", "WordPiece")


def read_tokenizer_json(files: TokenFiles) -> HFTokenizer:
    """The tokenizer in a folder with tokenizer.json. Raises ValueError."""
    path = files.folder / "tokenizer.json"
    with naming_panics(path):
        tokenizer = _from_json(path)
        special = _add_tokens(tokenizer, files)
        return HFTokenizer(files, tokenizer, special)


@contextmanager
def naming_panics(what: object) -> Iterator[None]:
    """A panic in the Rust library, which arrives as a BaseException of its own, as a ValueError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{what}: broken ({one_line(error)}); download the file again") from None


def _from_json(path: Path) -> tokenizers.Tokenizer:
    try:
        text = path.read_text(encoding="utf-8")
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:
        try:
            json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            raise ValueError(f"{path}: not valid JSON ({one_line(error)}); download the file again") from None
        raise ValueError(f"{path}: not a tokenizer ({one_line(error)}); download the file again") from None


def _add_tokens(tokenizer: tokenizers.Tokenizer, files: TokenFiles) -> set[int]:
    """Adds what the other files say about added tokens; returns the ids of the special ones.

    A token that has no id in any file is left out: it can't be in the model's vocabulary.
    """
    present = tokenizer.get_added_tokens_decoder()
    special = {i for i, token in present.items() if token.special}
    for token_id, token in files.added.items():
        wanted = tokenizers.AddedToken(
            token.content,
            single_word=token.single_word,
            lstrip=token.lstrip,
            rstrip=token.rstrip,
            normalized=token.normalized,
            special=token.special,
        )
        if present.get(token_id) == wanted and present[token_id].special == token.special:
            continue
        tokenizer.add_tokens([wanted])
        actual = tokenizer.token_to_id(token.content)
        if actual != token_id:
            raise ValueError(
                f"{files.folder / 'tokenizer_config.json'}: token {token.content!r} has id {token_id} there but "
                f"{actual} in the vocabulary; take all tokenizer files from the same checkpoint"
            )
    there = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    for content in [*files.named.values(), *files.extra]:
        flags: dict[str, Any] = {"normalized": False}
        if (old := there.get(content)) is not None:
            if old.special or content not in files.named.values():
                continue  # what is only listed keeps its flag; what has a role is special, as in `TokenFiles`
            flags = {name: getattr(old, name) for name in ("single_word", "lstrip", "rstrip", "normalized")}
        if tokenizer.token_to_id(content) is not None:
            tokenizer.add_special_tokens([tokenizers.AddedToken(content, special=True, **flags)])
    return special | {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
