"""The families of questions: what is asked, in several phrasings, and the one right answer, an English sentence."""

from collections.abc import Callable
from random import Random

from jaxinfer.demo.families import arithmetic, dates, words
from jaxinfer.demo.families.question import Question

FAMILIES: dict[str, Callable[[Random], Question]] = {
    "sum": arithmetic.sum_question,
    "difference": arithmetic.difference_question,
    "sequence": arithmetic.sequence_question,
    "compare": arithmetic.compare_question,
    "sort": arithmetic.sort_question,
    "number words": words.number_words_question,
    "reverse": words.reverse_question,
    "alphabet": words.alphabet_question,
    "count": words.count_question,
    "letter": words.letter_question,
    "weekday": dates.weekday_question,
    "month": dates.month_question,
    "date": dates.date_question,
}

__all__ = ["FAMILIES", "Question"]
