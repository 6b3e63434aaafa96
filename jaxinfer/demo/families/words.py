"""Numbers in words, and the letters of made-up words."""

from random import Random

from jaxinfer.demo.families.arithmetic import number
from jaxinfer.demo.families.question import Question

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


def number_words_question(rng: Random) -> Question:
    n = number(rng, 4)
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


def reverse_question(rng: Random) -> Question:
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


def alphabet_question(rng: Random) -> Question:
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


def count_question(rng: Random) -> Question:
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


def letter_question(rng: Random) -> Question:
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
