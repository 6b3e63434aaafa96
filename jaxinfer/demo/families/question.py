"""What every family makes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """One question.

    family: its name.
    content: what is asked, regardless of phrasing.
    text: how.
    answer: the only sentence that counts.
    """

    family: str
    content: tuple[int | str, ...]
    text: str
    answer: str
