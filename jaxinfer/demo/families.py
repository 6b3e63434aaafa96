"""The families of questions: what is asked, in several phrasings, and the one right answer, an English sentence."""

import calendar
import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class Question:
    """One question: `content` is what it asks regardless of phrasing, `answer` the only sentence that counts."""

    family: str
    content: tuple[int | str, ...]
    text: str
    answer: str


# Arithmetic ---------------------------------------------------------------------------------------------------------


def _number(rng: Random, digits: int) -> int:
    """A number of at most `digits` digits, short ones as frequent as long ones."""
    return rng.randrange(10 ** rng.randint(1, digits))


def _sum(rng: Random) -> Question:
    a, b = _number(rng, 3), _number(rng, 3)
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


def _difference(rng: Random) -> Question:
    b, a = sorted((_number(rng, 3), _number(rng, 3)))
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


def _sequence(rng: Random) -> Question:
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


def _compare(rng: Random) -> Question:
    a, b = _number(rng, 4), _number(rng, 4)
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


def _sort(rng: Random) -> Question:
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


# Words --------------------------------------------------------------------------------------------------------------

_ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth"]
_LONGEST_WORD = len(_ORDINALS)


def number_in_words(n: int) -> str:
    """English for `0 <= n < 10,000`: 4305 is "four thousand three hundred five", 42 "forty-two"."""
    if not 0 <= n < 10_000:
        raise ValueError(f"number_in_words: {n} is outside 0 to 9999")
    parts = []
    if n >= 1000:
        parts += [_ONES[n // 1000], "thousand"]
    if n % 1000 >= 100:
        parts += [_ONES[n % 1000 // 100], "hundred"]
    rest = n % 100
    if rest >= 20:
        parts.append(_TENS[rest // 10 - 2] + (f"-{_ONES[rest % 10]}" if rest % 10 else ""))
    elif rest or not n:
        parts.append(_ONES[rest])
    return " ".join(parts)


def _number_words(rng: Random) -> Question:
    n = _number(rng, 4)
    words = number_in_words(n)
    if rng.random() < 0.5:
        text = rng.choice((f"Write {n} in words.", f"How do you write {n} in words?", f"Spell out the number {n}."))
        return Question("number words", (n,), text, f"{n} in words is {words}.")
    text = rng.choice((f"Write {words} in digits.", f"Write {words} as a number.", f"Which number is {words}?"))
    return Question("number words", (n,), text, f"The number is {n}.")


_ONSETS = [
    "b",
    "c",
    "d",
    "f",
    "g",
    "h",
    "j",
    "k",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "t",
    "v",
    "w",
    "y",
    "z",
    "bl",
    "br",
    "ch",
    "cl",
    "cr",
    "dr",
    "fl",
    "fr",
    "gr",
    "ph",
    "pl",
    "pr",
    "qu",
    "sh",
    "sl",
    "sp",
    "st",
    "str",
    "th",
    "tr",
    "wh",
]
_VOWELS = ["a", "e", "i", "o", "u", "a", "e", "i", "o", "u", "ai", "ea", "ee", "ie", "oa", "oo", "ou"]
_CODAS = [
    "",
    "",
    "",
    *[
        "b",
        "d",
        "ff",
        "g",
        "k",
        "l",
        "ll",
        "m",
        "n",
        "p",
        "r",
        "s",
        "ss",
        "t",
        "x",
        "y",
        "ck",
        "lt",
        "mp",
        "nd",
        "ng",
        "nt",
        "rd",
        "rm",
        "rt",
        "sh",
        "st",
        "th",
    ],
]


def _word(rng: Random) -> str:
    """A made-up word of 3 to 8 letters; most of them could be English."""
    length = rng.randint(3, _LONGEST_WORD)
    if rng.random() < 0.15:
        return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=length))
    word = ""
    while len(word) < length:
        word += rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS)
    return word[:length]


def _reverse(rng: Random) -> Question:
    word = _word(rng)
    backwards = word[::-1]
    text = rng.choice(
        (
            f'Reverse the word "{word}".',
            f'Write "{word}" backwards.',
            f'What is "{word}" backwards?',
            f'What is the reverse of "{word}"?',
        )
    )
    return Question("reverse", (min(word, backwards),), text, f'Backwards it reads "{backwards}".')


def _alphabet(rng: Random) -> Question:
    word = _word(rng)
    text = rng.choice(
        (
            f'Sort the letters of "{word}".',
            f'Put the letters of "{word}" in alphabetical order.',
            f'Sort the letters in "{word}" alphabetically.',
        )
    )
    letters = "".join(sorted(word))
    return Question("alphabet", (letters,), text, f'In alphabetical order: "{letters}".')


def _count(rng: Random) -> Question:
    word = _word(rng)
    if rng.random() < 0.3:
        text = rng.choice(
            (f'How many letters does "{word}" have?', f'How many letters are in "{word}"?', f'How long is "{word}"?')
        )
        return Question("count", (word,), text, f"It has {len(word)} letters.")
    letter = rng.choice(word)
    spread = list(word)  # more of the same letter, or nearly every answer would be 1
    for index in rng.sample(range(len(word)), rng.randint(0, min(3, len(word) - 2))):
        spread[index] = letter
    word = "".join(spread)
    text = rng.choice(
        (
            f'How many times does the letter "{letter}" appear in "{word}"?',
            f'How often does "{letter}" appear in "{word}"?',
            f'Count the letter "{letter}" in "{word}".',
        )
    )
    n = word.count(letter)
    times = "once" if n == 1 else f"{n} times"
    return Question("count", (word, letter), text, f'The letter "{letter}" appears {times}.')


def _letter(rng: Random) -> Question:
    word = _word(rng)
    if rng.random() < 0.2:
        ordinal, index = "last", len(word) - 1
    else:
        index = rng.randrange(len(word))
        ordinal = _ORDINALS[index]
    text = rng.choice(
        (
            f'What is the {ordinal} letter of "{word}"?',
            f'Which letter is {ordinal} in "{word}"?',
            f'What is the {ordinal} letter in the word "{word}"?',
        )
    )
    return Question("letter", (word, index), text, f'The {ordinal} letter is "{word[index]}".')


# The calendar -------------------------------------------------------------------------------------------------------

_DAYS = tuple(calendar.day_name)
_MONTHS = tuple(calendar.month_name)[1:]
_COMMON_YEAR = 2023


def _weekday(rng: Random) -> Question:
    day, n, forward = rng.randrange(7), rng.randint(1, 100), rng.random() < 0.6
    other = _DAYS[(day + (n if forward else -n)) % 7]
    span = _span(n, "day", forward, _DAYS[day])
    text = rng.choice((f"What day is {span}?", f"Which day comes {span}?", f"What day of the week is {span}?"))
    answer = f"{_how_many(n, 'day')} are {_divided(n, 7, 'week', 'day')}, so it is {other}."
    return Question("weekday", (day, n, forward), text, answer if n >= 7 else f"{span} is {other}.")


def _month(rng: Random) -> Question:
    month, n, forward = rng.randrange(12), rng.randint(1, 60), rng.random() < 0.6
    other = _MONTHS[(month + (n if forward else -n)) % 12]
    span = _span(n, "month", forward, _MONTHS[month])
    text = rng.choice((f"What month is {span}?", f"Which month comes {span}?", f"Which month is {span}?"))
    answer = f"{_how_many(n, 'month')} are {_divided(n, 12, 'year', 'month')}, so it is {other}."
    return Question("month", (month, n, forward), text, answer if n >= 12 else f"{span} is {other}.")


def _date(rng: Random) -> Question:
    """Dates of a year without a 29 February."""
    day = datetime.date(_COMMON_YEAR, 1, 1) + datetime.timedelta(rng.randrange(365))
    n, forward = rng.randint(1, 40), rng.random() < 0.6
    other = day + datetime.timedelta(n if forward else -n)
    span = _span(n, "day", forward, _day_and_month(day))
    text = rng.choice((f"What date is {span}?", f"Which date comes {span}?", f"What is the date {span}?"))
    answer = f"{span} is {_day_and_month(other)}."
    return Question("date", (day.month, day.day, n, forward), text, answer)


def _span(n: int, unit: str, forward: bool, start: str) -> str:
    return f"{_how_many(n, unit)} {'after' if forward else 'before'} {start}"


def _how_many(n: int, unit: str) -> str:
    return f"{n} {unit}{'' if n == 1 else 's'}"


def _divided(n: int, size: int, large: str, small: str) -> str:
    """`n >= size` small units in large ones: 17 days are "2 weeks and 3 days"."""
    whole, rest = divmod(n, size)
    return _how_many(whole, large) + (f" and {_how_many(rest, small)}" if rest else "")


def _day_and_month(day: datetime.date) -> str:
    return f"{_MONTHS[day.month - 1]} {day.day}"


# All of them --------------------------------------------------------------------------------------------------------

FAMILIES: dict[str, Callable[[Random], Question]] = {
    "sum": _sum,
    "difference": _difference,
    "sequence": _sequence,
    "compare": _compare,
    "sort": _sort,
    "number words": _number_words,
    "reverse": _reverse,
    "alphabet": _alphabet,
    "count": _count,
    "letter": _letter,
    "weekday": _weekday,
    "month": _month,
    "date": _date,
}
