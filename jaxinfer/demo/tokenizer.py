"""The demo's SentencePiece tokenizer: whole words for the sentences, single letters inside quotation marks.

A BPE model merges neighbours only into pieces of its vocabulary. Here every piece of several characters is the
beginning of a known word *with the space (or hyphen) before it*, so `▁letter` is one piece, while in `"letter"`, after
a quotation mark, no two characters can merge: the model sees each letter of a word that it is to reverse, sort or
count. Digits never merge either. Characters beyond ASCII are spelled in bytes.
"""

import re
import struct
from collections.abc import Iterable

import sentencepiece

UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
_SPACE = "▁"  # how SentencePiece writes a space
_WORD = re.compile(r'(?:(-)|(?<!["\w]))([A-Za-z]+)(?!["\w])')  # not what stands in quotation marks

# Numbers of sentencepiece_model.proto (https://github.com/google/sentencepiece/blob/master/src/).
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # SentencePiece.Type
_BPE = 2  # TrainerSpec.ModelType


def build_tokenizer(sentences: Iterable[str]) -> bytes:
    """The content of a `tokenizer.model` that knows the words outside quotation marks."""
    beginnings = {_SPACE + mark for mark in '"+-='}
    for sentence in sentences:
        for hyphen, word in _WORD.findall(sentence):
            spellings = {word} if hyphen else {word, word[0].lower() + word[1:]}
            for spelling in spellings:
                whole = (hyphen or _SPACE) + spelling
                beginnings.update(whole[:end] for end in range(2, len(whole) + 1))
    pieces = [("<unk>", _UNKNOWN), ("<s>", _CONTROL), ("</s>", _CONTROL)]
    pieces += [(f"<0x{byte:02X}>", _BYTE) for byte in range(256)]
    # A merge with a higher score comes first, so shorter beginnings have the higher ones.
    pieces += [(piece, _NORMAL) for piece in sorted(beginnings, key=lambda piece: (len(piece), piece))]
    pieces += [(piece, _NORMAL) for piece in (_SPACE, *map(chr, range(0x21, 0x7F)))]
    return _model_proto(pieces)


def load_tokenizer(model: bytes) -> sentencepiece.SentencePieceProcessor:
    """The processor of a `tokenizer.model`'s content."""
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def _model_proto(pieces: list[tuple[str, int]]) -> bytes:
    """A serialized ModelProto. By hand: sentencepiece's own generated classes work with few releases of protobuf."""
    model = b""
    for rank, (piece, kind) in enumerate(pieces):
        score = -float(rank) if kind == _NORMAL else 0.0
        model += _field(1, _field(1, piece.encode()) + _field(2, score) + _field(3, kind))
    unk_bos_eos_pad = _field(40, UNK_ID) + _field(41, BOS_ID) + _field(42, EOS_ID) + _field(43, 2**64 - 1)  # no padding
    split_digits, byte_fallback = _field(25, 1), _field(35, 1)
    trainer = _field(3, _BPE) + _field(4, len(pieces)) + split_digits + byte_fallback + unk_bos_eos_pad
    add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces = _field(3, 1), _field(4, 0), _field(5, 1)
    normalizer = _field(1, b"identity") + add_dummy_prefix + remove_extra_whitespaces + escape_whitespaces
    return model + _field(2, trainer) + _field(3, normalizer)


def _field(number: int, value: bytes | float | int) -> bytes:
    """A field in protobuf's wire format: int as varint, float as 32 bits, bytes with their length before them."""
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    groups = b""
    while value > 0x7F:
        groups += bytes([value & 0x7F | 0x80])
        value >>= 7
    return groups + bytes([value])
