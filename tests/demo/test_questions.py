"""Questions: held-out and training ones never meet, and every answer is right by another way of computing it."""

import datetime
import itertools
import re
import subprocess
import sys
from collections import Counter, defaultdict
from random import Random

import pytest

from jaxinfer.demo.families import FAMILIES, Question
from jaxinfer.demo.questions import held_out_questions, is_held_out, training_questions

SMALL = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
TEENS = ["thir", "four", "fif", "six", "seven", "eigh", "nine"]
TENS = ["twen", "thir", "for", "fif", "six", "seven", "eigh", "nine"]
ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth"]


def samples(family: str, n: int = 300) -> list[Question]:
    rng = Random(family)
    return [FAMILIES[family](rng) for _ in range(n)]


def numbers(text: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", text)]


def asked(question: Question) -> tuple[object, ...]:
    """What a question asks, read off its text alone: numbers, words in quotation marks, names, number words."""
    text = question.text.lower()
    unordered = sorted(numbers(text))
    if question.family == "number words" and not unordered:
        unordered = [in_digits(re.sub(r"(^write | in digits| as a number|which number is |[.?\n])", "", text).strip())]
    calendar = re.findall(
        "before|after|mon|tue|wed|thu|fri|sat|sun|jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec", text
    )
    ordinals = re.findall("|".join([*ORDINALS, "last"]), text)
    in_order = question.family in ("sequence", "weekday", "month", "date")
    numbers_asked = numbers(text) if in_order else unordered
    return (question.family, *numbers_asked, *re.findall(r"[\"'](\w+)[\"']", text), *calendar, *ordinals)


def in_digits(words: str) -> int:
    """The number of its English name."""
    small = dict(zip(SMALL, range(13), strict=True))
    small |= {f"{stem}teen": n for stem, n in zip(TEENS, range(13, 20), strict=True)}

    small |= {f"{stem}ty": n * 10 for n, stem in enumerate(TENS, 2)}
    total = group = 0
    for word in words.replace("-", " ").split():
        if word == "thousand":
            total, group = total + group * 1000, 0
        else:
            group = group * 100 if word == "hundred" else group + small[word]
    return total + group


def test_held_out_and_training_questions_are_disjoint():
    training = list(itertools.islice(training_questions(3), 40_000))
    held_out = held_out_questions(5000, seed=1)
    assert not {(q.family, q.content) for q in training} & {(q.family, q.content) for q in held_out}
    assert not {q.text.lower().strip(" \n.?") for q in training} & {q.text.lower().strip(" \n.?") for q in held_out}
    # By what the text says, in any phrasing; where the quotation marks are left out, it says too little.
    about_words = ("reverse", "alphabet", "count", "letter")
    readable = [q for q in training if q.family not in about_words or re.search(r"[\"']\w{3,}[\"']", q.text)]
    assert len(readable) > 38_000
    assert not {asked(q) for q in readable} & {asked(q) for q in held_out}


def test_one_content_is_held_out_in_all_its_phrasings_or_in_none():
    decided = defaultdict(set)
    phrasings = defaultdict(set)
    for family in ("sum", "number words", "weekday", "compare"):
        for question in samples(family, 4000):
            decided[asked(question)].add(is_held_out(question))
            phrasings[asked(question)].add(question.text)
    assert all(len(decision) == 1 for decision in decided.values())
    assert sum(len(texts) > 1 for texts in phrasings.values()) > 300


def test_the_split_is_the_one_that_the_packaged_model_was_trained_on():
    held_out = [n for n in range(60) if is_held_out(Question("sum", (27, 27 + n), "", ""))]
    assert held_out == [1, 7, 8, 20, 27, 28, 33, 37, 52, 54, 55, 59]
    share = sum(is_held_out(q) for q in samples("date", 8000)) / 8000
    assert 0.105 < share < 0.145


def test_there_are_5000_distinct_held_out_questions_in_equal_shares():
    questions = held_out_questions(5000, seed=2)
    assert len({q.text for q in questions}) == 5000
    counts = Counter(q.family for q in questions)
    assert set(counts) == set(FAMILIES)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_seeds_decide():
    assert held_out_questions(100, seed=5) == held_out_questions(100, seed=5)
    assert held_out_questions(100, seed=5) != held_out_questions(100, seed=6)
    first, again, other = (list(itertools.islice(training_questions(seed), 100)) for seed in (5, 5, 6))
    assert first == again
    assert first != other


@pytest.mark.parametrize(("n", "message"), [(0, "at least 1"), (10**6, "at most 5000")])
def test_impossible_counts_are_refused(n, message):
    with pytest.raises(ValueError, match=message):
        held_out_questions(n)


def test_questions_need_no_jax():
    code = "import sys, jaxinfer.demo.questions; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(("family", "sign"), [("sum", 1), ("difference", -1)])
def test_sums_and_differences(family, sign):
    for q in samples(family):
        a, b, result = numbers(q.answer)
        assert sorted(numbers(q.text)) == sorted((a, b))
        assert a + sign * b == result
        assert q.answer == f"{a} {'+' if sign == 1 else '-'} {b} = {result}."


def test_sequences():
    for q in samples("sequence"):
        shown, (following,) = numbers(q.text), numbers(q.answer)
        assert len({b - a for a, b in itertools.pairwise([*shown, following])}) == 1


def test_comparisons():
    for q in samples("compare"):
        first, second = numbers(q.answer)
        assert {first, second} == set(numbers(q.text))
        assert (first < second) == ("smaller" in q.text) == ("smaller" in q.answer)


def test_sorted_numbers():
    for q in samples("sort"):
        shown, ordered = numbers(q.text), numbers(q.answer)
        assert Counter(shown) == Counter(ordered)
        descending = "descending" in q.text or "to smallest" in q.text
        assert all((a > b) == descending for a, b in itertools.pairwise(ordered))


def test_number_words():
    for q in samples("number words", 1000):
        if numbers(q.text):
            (n,) = numbers(q.text)
            words = q.answer.removeprefix(f"{n} in words is ").removesuffix(".")
        else:
            (n,) = numbers(q.answer)
            words = re.sub(r"^(Write|Which number is) | (in digits|as a number)|[.?]", "", q.text)
        assert in_digits(words) == n


def test_words():
    for q in samples("reverse"):
        (word,), (answer,) = re.findall('"(.+?)"', q.text), re.findall('"(.+?)"', q.answer)
        assert "".join(reversed(word)) == answer
    for q in samples("alphabet"):
        (word,), (answer,) = re.findall('"(.+?)"', q.text), re.findall('"(.+?)"', q.answer)
        assert Counter(word) == Counter(answer)
        assert all(a <= b for a, b in itertools.pairwise(answer))
    for q in samples("count"):
        *letter, word = re.findall('"(.+?)"', q.text)
        n = int(next(iter(re.findall(r"\d+", q.answer)), 1))  # 1 is "once"
        assert n == (len(re.findall(letter[0], word)) if letter else len(word))
    for q in samples("letter"):
        (ordinal,) = re.findall("|".join([*ORDINALS, "last"]), q.text)
        (word,), (answer,) = re.findall('"(.+?)"', q.text), re.findall('"(.+?)"', q.answer)
        assert list(word)[-1 if ordinal == "last" else ORDINALS.index(ordinal)] == answer
        assert ordinal in q.answer


def test_days_and_dates():
    for q in samples("weekday"):
        n, start, end = (
            numbers(q.text)[0],
            re.findall(r"\w+day\b(?!s)", q.text)[-1],
            re.findall(r"\w+day\b", q.answer)[-1],
        )
        day = next(d for d in (datetime.date(2024, 5, i) for i in range(1, 8)) if d.strftime("%A") == start)
        day += datetime.timedelta(n if "after" in q.text else -n)
        assert day.strftime("%A") == end
        if n >= 7:
            weeks, days = (int((re.findall(rf"(\d+) {unit}", q.answer) or [0])[-1]) for unit in ("week", "day"))
            assert weeks * 7 + (days if days < 7 else 0) == n
    for q in samples("date"):
        n = numbers(q.text)[0]
        start, end = (
            datetime.datetime.strptime(f"2023 {re.findall(r'[A-Z][a-z]+ [0-9]+', text)[-1]}", "%Y %B %d")
            for text in (q.text, q.answer)
        )
        assert (end - start).days % 365 == (n if "after" in q.text else -n) % 365


def test_months():
    names = [datetime.date(2024, i, 1).strftime("%B") for i in range(1, 13)]
    for q in samples("month"):
        n = numbers(q.text)[0]
        start, end = (names.index(re.findall("|".join(names), text)[-1]) for text in (q.text, q.answer))
        assert (start + (n if "after" in q.text else -n) - end) % 12 == 0
        if n >= 12:
            years, months = (int((re.findall(rf"(\d+) {unit}", q.answer) or [0])[-1]) for unit in ("year", "month"))
            assert years * 12 + (months if months < 12 else 0) == n
