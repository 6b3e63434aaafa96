"""Pairs of questions that ask for the same in other words: what the packaged encoder has to put together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import TypeVar

from jaxinfer.demo.families import FAMILIES, Question
from jaxinfer.demo.questions import is_held_out

T = TypeVar("T")
FAMILIES_AT_A_TIME = 3  # so that most of those that must be told apart are of the same kind


class _Phrasing(Random):
    """Chooses words, which families have in tuples, by a generator of its own: the same seed asks for the same."""

    words: Random

    def choice(self, seq: Sequence[T]) -> T:  # type: ignore[override]
        return self.words.choice(seq) if isinstance(seq, tuple) else super().choice(seq)


def phrasings(family: str, rng: Random) -> tuple[Question, Question]:
    """Two questions with the same content, in different words."""
    seed = rng.getrandbits(64)

    def ask() -> Question:
        phrasing = _Phrasing(seed)
        phrasing.words = rng
        return FAMILIES[family](phrasing)

    first = second = ask()
    while second.text == first.text:
        second = ask()
    return first, second


def training_pairs(seed: int, count: int) -> Iterator[list[tuple[Question, Question]]]:
    """Endless lists of so many pairs to train on, no content twice in a list and none of them held out."""
    rng = Random(f"training pairs {seed}")
    while True:
        families = rng.sample(list(FAMILIES), FAMILIES_AT_A_TIME)
        yield _distinct(rng, families, count, held_out=False)


def held_out_pairs(count: int, seed: int = 0) -> list[tuple[Question, Question]]:
    """Held-out pairs of distinct contents, families in turn."""
    return _distinct(Random(f"held-out pairs {seed}"), list(FAMILIES), count, held_out=True)


def _distinct(rng: Random, families: Sequence[str], count: int, held_out: bool) -> list[tuple[Question, Question]]:
    pairs: dict[tuple[object, ...], tuple[Question, Question]] = {}
    tried = 0
    while len(pairs) < count:
        first, second = phrasings(families[tried % len(families)], rng)
        tried += 1
        if is_held_out(first) == held_out:
            pairs.setdefault((first.family, *first.content), (first, second))
    return list(pairs.values())
