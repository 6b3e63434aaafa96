"""Which questions the demo model is trained on, and which are held out.

A keyed hash of a question's *content* (the two summands, the word, the date and so on) decides, so training and
held-out questions are disjoint by construction, in every phrasing: if "What is 27 + 45?" is held out, so are
"Add 45 and 27." and all others that ask for the same.
"""

import hashlib
from collections.abc import Iterator
from random import Random

from jaxinfer.demo.families import FAMILIES, Question

HELD_OUT_SHARE = 8  # one content in so many is never trained on
_HASH_KEY = b"jaxinfer demo held-out questions"


def is_held_out(question: Question) -> bool:
    """Whether the content of this question is kept out of training."""
    content = "\x1f".join(map(str, (question.family, *question.content)))
    digest = hashlib.blake2b(content.encode(), key=_HASH_KEY, digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_SHARE == 0


def training_questions(seed: int) -> Iterator[Question]:
    """An endless stream of questions to train on, none of them held out, families in equal shares.

    Some are worded less carefully than the held-out ones (lower case, no question mark, ...): people type like that.
    """
    rng = Random(f"training {seed}")
    samplers = list(FAMILIES.values())
    while True:
        question = rng.choice(samplers)(rng)
        if not is_held_out(question):
            yield Question(question.family, question.content, carelessly(question.text, rng), question.answer)


def held_out_questions(n: int, seed: int = 0) -> list[Question]:
    """`n` distinct held-out questions, families in turn; the same for the same `n` and `seed`.

    Raises ValueError if a family has not enough of them.
    """
    if n < 1:
        raise ValueError(f"questions: {n} held-out questions asked for; ask for at least 1")
    rng = Random(f"held out {seed}")
    names = list(FAMILIES)
    questions: dict[str, Question] = {}
    while len(questions) < n:
        sampler = FAMILIES[names[len(questions) % len(names)]]
        for _ in range(10_000):
            question = sampler(rng)
            if is_held_out(question) and question.text not in questions:
                questions[question.text] = question
                break
        else:
            raise ValueError(f"questions: {n} held-out questions are more than there are; ask for at most 5000")
    return list(questions.values())


def carelessly(text: str, rng: Random) -> str:
    """A text as people type it."""
    if rng.random() < 0.15:
        text = text[0].lower() + text[1:]
    if rng.random() < 0.15:
        text = text[:-1]
    if rng.random() < 0.1:
        text = text.replace(" + ", "+").replace(" - ", "-")
    if rng.random() < 0.1:
        text = text.replace('"', rng.choice(("", "'")))
    if rng.random() < 0.15:
        text += rng.choice(("\n", " "))
    return text
