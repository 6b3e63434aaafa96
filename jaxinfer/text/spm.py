"""SentencePiece `tokenizer.model` (Kudo and Richardson 2018), alone or with Hugging Face's files beside it."""

import re
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from jaxinfer.text.base import Tokenizer
from jaxinfer.text.chat import load_chat_templates
from jaxinfer.text.encoding import Slot
from jaxinfer.text.files import AddedToken, TokenFiles, one_line

__all__ = ["SentencePieceTokenizer", "model_of"]

# ModelProto.normalizer_spec = {add_dummy_prefix: false, remove_extra_whitespaces: false} in protobuf's wire format.
# Concatenated messages merge, so a model followed by this is the same model that leaves spaces alone.
_KEEP_SPACES = bytes([0x1A, 4, 0x18, 0, 0x20, 0])


class SentencePieceTokenizer(Tokenizer):
    """As Llama's: BOS before a prompt unless `add_bos_token` is false, EOS after it only if `add_eos_token` is true,
    the dummy space only at the start of the text (after every added token if `legacy` is true).
    """

    def __init__(self, files: TokenFiles) -> None:
        path = files.folder / "tokenizer.model"
        proto = path.read_bytes()
        whole, inner = (model_of(proto + more, path) for more in (b"", _KEEP_SPACES))
        self._inner = inner  # for text and tokens that follow others
        self._whole = whole if files.flag("add_prefix_space", True) else inner  # for the start of the text
        self._legacy = files.flag("legacy", False)
        self._size = len(whole)

        literals = self._literal_tokens(files)
        self._literals = literals
        self._literal_id = {token.content: i for i, token in literals.items()}
        self._pattern = _match_any(literals.values())
        self.special_ids = frozenset(i for i, token in literals.items() if token.special)
        fallback = [i for i in range(self._size) if whole.IsByte(i) and i not in literals]
        self.byte_values = {i: int(whole.IdToPiece(i)[3:5], 16) for i in fallback}
        self.vocab_size = max(self._size, *(i + 1 for i in literals))
        self.known_ids = frozenset(range(self._size)) | literals.keys()
        self.bos_token_id = self._token_id(files, "bos_token", whole.bos_id())
        self.eos_token_id = self._token_id(files, "eos_token", whole.eos_id())
        bos, eos = self.bos_token_id, self.eos_token_id
        self.prefix = [bos] if bos is not None and files.flag("add_bos_token", True) else []
        self.suffix = [eos] if eos is not None and files.flag("add_eos_token", False) else []
        names = {"bos_token": bos, "eos_token": eos}
        known = {name: literals[i].content for name, i in names.items() if i in literals}
        super().__init__(files.folder, load_chat_templates(files.folder, files.config, known | files.named))

    def encode_text(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = []
        at = 0
        for match in self._pattern.finditer(text):
            start, end = match.span()
            if start < at:  # inside whitespace that the token before has swallowed
                continue
            token_id = self._literal_id[match[0]]
            token = self._literals[token_id]
            before = text[at:start]
            ids += self._encode_between(before.rstrip() if token.lstrip else before, at == 0)
            ids.append(token_id)
            at = end
            while token.rstrip and at < len(text) and text[at].isspace():
                at += 1
        ids += self._encode_between(text[at:], at == 0)
        return [*self.prefix, *ids, *self.suffix] if add_special_tokens else ids

    def token_id(self, token: str) -> int | None:
        found: int = self._literal_id.get(token, self._whole.PieceToId(token))
        return None if self._whole.IsUnknown(found) else found

    def make_frame(self, texts: int, add_special_tokens: bool) -> list[Slot]:
        around = (self.prefix, self.suffix) if add_special_tokens else ([], [])
        before, after = ([[Slot(None, token_id, i) for token_id in ids] for i in range(texts)] for ids in around)
        return [slot for i in range(texts) for slot in (*before[i], Slot(i, 0, i), *after[i])]

    def _encode_between(self, text: str, at_start: bool) -> list[int]:
        if not text:
            return []
        model = self._whole if at_start or self._legacy else self._inner
        ids: list[int] = model.Encode(text, out_type=int)
        return ids

    def decode_raw(self, ids: list[int]) -> str:
        parts: list[str] = []
        run: list[int] = []
        model = self._whole
        for token_id in ids:
            literal = self._literals.get(token_id)
            if literal is None:
                if token_id < self._size:
                    run.append(token_id)
                continue
            parts += [model.Decode(run) if run else "", literal.content]
            run, model = [], self._inner
        parts.append(model.Decode(run) if run else "")
        return "".join(parts)

    def _literal_tokens(self, files: TokenFiles) -> dict[int, AddedToken]:
        """Tokens that stand for their own text: SentencePiece's control and unknown pieces, and added tokens."""
        model = self._whole
        literals = {
            i: AddedToken(model.IdToPiece(i), special=True)
            for i in range(self._size)
            if model.IsControl(i) or model.IsUnknown(i)
        }
        # The files may give a reserved piece a new text.
        literals |= files.added
        by_text = {token.content: i for i, token in literals.items()}
        for content in [*files.named.values(), *files.extra]:
            token_id = by_text.get(content, model.PieceToId(content))
            if model.IdToPiece(token_id) == content if token_id < self._size else content in by_text:
                literals.setdefault(token_id, AddedToken(content, special=True))
        return literals

    def _token_id(self, files: TokenFiles, name: str, default: int) -> int | None:
        if name in files.named:
            return self._literal_id.get(files.named[name])
        return default if default >= 0 else None


def model_of(proto: bytes, path: Path) -> sentencepiece.SentencePieceProcessor:
    """The model in the bytes of a file. Raises ValueError."""
    sentencepiece.set_min_log_level(3)  # its complaints arrive as exceptions too
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(proto)
    except Exception as error:
        raise ValueError(
            f"{path}: not a SentencePiece model ({one_line(error)}); download it again, or add the checkpoint's "
            "tokenizer.json"
        ) from None
    return model


def _match_any(tokens: Iterable[AddedToken]) -> re.Pattern[str]:
    """A pattern that finds any of the tokens, the longest first."""

    def literal(token: AddedToken) -> str:
        text = re.escape(token.content)
        return rf"(?<!\w){text}(?!\w)" if token.single_word else text

    return re.compile("|".join(literal(t) for t in sorted(tokens, key=lambda t: -len(t.content))) or "(?!)")
