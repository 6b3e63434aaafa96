"""One or two texts as a model's input: special tokens around them, cut to a length, with where each token is from.

A `Part` is what a text alone becomes; a frame, which a tokenizer has for one text and for two, says what stands around
parts. Names are those of the `tokenizers` library.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, NamedTuple, get_args

from jaxinfer.errors import RequestError

__all__ = ["Encoding", "Part", "Slot", "Truncation", "frame_of", "framed"]

Strategy = Literal["longest_first", "only_first", "only_second"]
Side = Literal["right", "left"]


@dataclass(frozen=True)
class Truncation:
    """How to cut what is too long. Raises RequestError.

    max_length: most tokens of an input, with special tokens.
    strategy: which text loses tokens: the longer one each time, the first, or the second.
    side: the end at which it loses them.
    stride: tokens of the text that a window has in common with the one before (see `Tokenizer.windows`).
    """

    max_length: int
    strategy: Strategy = "longest_first"
    side: Side = "right"
    stride: int = 0

    def __post_init__(self) -> None:
        for name, known in (("strategy", get_args(Strategy)), ("side", get_args(Side))):
            if getattr(self, name) not in known:
                raise RequestError.at(name, f"{getattr(self, name)!r:.80} is none of {', '.join(known)}")
        for name, least in (("max_length", 1), ("stride", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise RequestError.at(name, f"{value!r:.80} is no integer of at least {least}")


class Part(NamedTuple):
    """A text as tokens.

    offsets: the characters [start, end) of the text that each token is of.
    word_ids: which of the text's words each token is of; None for what is of none.
    Both are None where the tokenizer doesn't tell: SentencePiece's and Python ones, and ids that were given.
    """

    ids: list[int]
    offsets: list[tuple[int, int]] | None = None
    word_ids: list[int | None] | None = None


class Slot(NamedTuple):
    """A place in a frame: a special token's, or that of a text.

    sequence: 0 or 1, the text whose place it is; None for a special token.
    token_id: the special token.
    type_id: what tells a model the texts of a pair apart, as token_type_ids.
    """

    sequence: int | None
    token_id: int
    type_id: int


@dataclass(frozen=True)
class Encoding:
    """A model's input. All lists are as long as `ids`.

    ids, type_ids: the tokens, and which text's they are as models are told.
    special_tokens_mask: 1 for what was put around the texts, 0 for what is of them.
    sequence_ids: 0 or 1, the text that a token is of; None for special tokens.
    offsets, word_ids: as in `Part`, within its own text; (0, 0) and None for special tokens.
    """

    ids: list[int]
    type_ids: list[int]
    special_tokens_mask: list[int]
    sequence_ids: list[int | None]
    offsets: list[tuple[int, int]] | None
    word_ids: list[int | None] | None


def frame_of(ids: Sequence[int], type_ids: Sequence[int], sequence_ids: Sequence[int | None]) -> list[Slot]:
    """The frame of a sample that a tokenizer has made."""
    slots = []
    for sequence, run in groupby(zip(sequence_ids, ids, type_ids, strict=True), key=lambda token: token[0]):
        tokens = [Slot(*token) for token in run]
        slots += tokens if sequence is None else tokens[:1]
    return slots


def framed(frame: Sequence[Slot], parts: Sequence[Part], truncation: Truncation | None) -> Iterator[Encoding]:
    """The input, then the further windows of the text that was cut. Raises RequestError for what can't be cut so."""
    lengths = [len(part.ids) for part in parts]
    whole = [(0, length) for length in lengths]
    kept = lengths if truncation is None else _kept(len(frame) - len(parts), lengths, truncation)
    if truncation is None or kept == lengths:
        yield _input(frame, parts, whole)
        return
    if truncation.strategy == "longest_first" and len(parts) == 2:
        yield _input(frame, parts, [next(_cuts(*pair, truncation)) for pair in zip(lengths, kept, strict=True)])
        return
    cut = int(truncation.strategy == "only_second")
    for window in _cuts(lengths[cut], kept[cut], truncation):
        yield _input(frame, parts, [window if i == cut else span for i, span in enumerate(whole)])


def _kept(special: int, lengths: list[int], truncation: Truncation) -> list[int]:
    """How many tokens of each text remain, as `tokenizers` has it."""
    room = truncation.max_length - special
    if room < 0:
        raise RequestError.at(
            "max_length", f"{truncation.max_length} is less than the {special} special tokens of an input; raise it"
        )
    _check_stride(truncation, room)
    excess = sum(lengths) - room
    if excess <= 0:
        return lengths
    if truncation.strategy == "longest_first":
        if len(lengths) == 1:
            return [room]
        shorter, longer = sorted(lengths)
        longer = max(shorter, room - shorter)
        if shorter + longer > room:
            shorter, longer = room // 2, room - room // 2
        return [shorter, longer] if lengths[0] <= lengths[1] else [longer, shorter]
    cut = int(truncation.strategy == "only_second")
    if cut >= len(lengths):
        raise RequestError.at("strategy", "only_second is for pairs, and there is one text; use only_first")
    if lengths[cut] <= excess:
        raise RequestError.at(
            "max_length",
            f"{truncation.max_length} leaves no room: {excess} tokens too many, and the text that may lose some "
            f"({truncation.strategy}) has {lengths[cut]}; raise it, or use longest_first",
        )
    return [length - excess * (i == cut) for i, length in enumerate(lengths)]


def _cuts(length: int, kept: int, truncation: Truncation) -> Iterator[tuple[int, int]]:
    """The windows [start, end) of a text, of which each has `kept` tokens at most."""
    if kept == length or not kept:
        yield 0, kept
        return
    _check_stride(truncation, kept)
    for passed in range(0, length, kept - truncation.stride):
        end = min(passed + kept, length)
        yield (passed, end) if truncation.side == "right" else (length - end, length - passed)
        if end == length:
            return


def _check_stride(truncation: Truncation, room: int) -> None:
    if truncation.stride and truncation.stride >= room:
        raise RequestError.at(
            "stride", f"{truncation.stride} is not below the {room} tokens of a text that fit a window; lower it"
        )


def _input(frame: Sequence[Slot], parts: Sequence[Part], spans: Sequence[tuple[int, int]]) -> Encoding:
    ids: list[int] = []
    type_ids: list[int] = []
    sequence_ids: list[int | None] = []
    offsets: list[tuple[int, int]] = []
    word_ids: list[int | None] = []
    for slot in frame:
        part, (start, end) = Part([slot.token_id]), (0, 1)
        if slot.sequence is not None:
            part, (start, end) = parts[slot.sequence], spans[slot.sequence]
        count = end - start
        ids += part.ids[start:end]
        type_ids += [slot.type_id] * count
        sequence_ids += [slot.sequence] * count
        offsets += [(0, 0)] * count if part.offsets is None else part.offsets[start:end]
        word_ids += [None] * count if part.word_ids is None else part.word_ids[start:end]
    mask = [int(sequence is None) for sequence in sequence_ids]
    told = all(part.offsets is not None for part in parts)
    return Encoding(ids, type_ids, mask, sequence_ids, offsets if told else None, word_ids if told else None)
