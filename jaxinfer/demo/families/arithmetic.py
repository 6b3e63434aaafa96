"""Sums, differences, sequences, comparing and sorting."""

from collections.abc import Sequence
from random import Random

from jaxinfer.demo.families.question import Question


def number(rng: Random, digits: int) -> int:
    """A number of at most `digits` digits, short ones as frequent as long ones."""
    return rng.randrange(10 ** rng.randint(1, digits))


def sum_question(rng: Random) -> Question:
    a, b = number(rng, 3), number(rng, 3)
    text = rng.choice(
        (
            f"What is {a} + {b}?",
            f"What is {a} plus {b}?",
            f"Add {a} and {b}.",
            f"What is the sum of {a} and {b}?",
            f"How much is {a} + {b}?",
            f"Calculate {a} + {b}.",
        )
    )
    return Question("sum", (min(a, b), max(a, b)), text, f"{a} + {b} = {a + b}.")


def difference_question(rng: Random) -> Question:
    b, a = sorted((number(rng, 3), number(rng, 3)))
    text = rng.choice(
        (
            f"What is {a} - {b}?",
            f"What is {a} minus {b}?",
            f"Subtract {b} from {a}.",
            f"What is the difference between {a} and {b}?",
            f"How much is {a} - {b}?",
            f"Calculate {a} - {b}.",
        )
    )
    return Question("difference", (a, b), text, f"{a} - {b} = {a - b}.")


def sequence_question(rng: Random) -> Question:
    start, step = rng.randrange(100), rng.randint(1, 20)
    terms = [start + step * i for i in range(4)]
    if rng.random() < 0.4:  # the content is the set of numbers: both directions of it are held out, or neither
        terms = [start + step * i for i in range(4, 0, -1)]
        following = start
    else:
        following = start + step * 4
    shown = ", ".join(map(str, terms))
    text = rng.choice(
        (
            f"What comes next: {shown}?",
            f"Which number comes next: {shown}?",
            f"Continue the sequence {shown}.",
            f"What is the next number after {shown}?",
        )
    )
    return Question("sequence", (start, step), text, f"The next number is {following}.")


def compare_question(rng: Random) -> Question:
    a, b = number(rng, 4), number(rng, 4)
    if rng.random() < 0.5:  # numbers that differ late are the harder ones
        b = max(0, a + rng.randint(-20, 20))
    if a == b:
        b = a + 1
    low, high = min(a, b), max(a, b)
    larger = rng.choice(("larger", "greater", "bigger"))
    ask_larger = rng.random() < 0.5
    adjective = larger if ask_larger else "smaller"
    text = rng.choice(
        (
            f"Which is {adjective}, {a} or {b}?",
            f"Which number is {adjective}: {a} or {b}?",
            f"What is {adjective}, {a} or {b}?",
        )
    )
    first, second = (high, low) if ask_larger else (low, high)
    return Question("compare", (low, high), text, f"{first} is {adjective} than {second}.")


def sort_question(rng: Random) -> Question:
    numbers = rng.sample(range(100), rng.randint(3, 5))
    descending = rng.random() < 0.4
    order = "from largest to smallest" if descending else "from smallest to largest"
    direction = "descending" if descending else "ascending"
    shown = _listing(numbers)
    text = rng.choice(
        (
            f"Sort {shown} {order}.",
            f"Sort the numbers {shown} in {direction} order.",
            f"Put {shown} in {direction} order.",
            f"Order the numbers {shown} {order}.",
        )
    )
    answer = f"{order.capitalize()}: {_listing(sorted(numbers, reverse=descending))}."
    return Question("sort", tuple(sorted(numbers)), text, answer)


def _listing(items: Sequence[int]) -> str:
    return f"{', '.join(map(str, items[:-1]))} and {items[-1]}"
