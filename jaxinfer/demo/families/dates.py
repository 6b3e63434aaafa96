"""Days, months and dates."""

import calendar
import datetime
from random import Random

from jaxinfer.demo.families.question import Question

_DAYS = tuple(calendar.day_name)
_MONTHS = tuple(calendar.month_name)[1:]
_COMMON_YEAR = 2023


def weekday_question(rng: Random) -> Question:
    day, n, forward = rng.randrange(7), rng.randint(1, 100), rng.random() < 0.6
    other = _DAYS[(day + (n if forward else -n)) % 7]
    span = _span(n, "day", forward, _DAYS[day])
    text = rng.choice((f"What day is {span}?", f"Which day comes {span}?", f"What day of the week is {span}?"))
    answer = f"{_how_many(n, 'day')} are {_divided(n, 7, 'week', 'day')}, so it is {other}."
    return Question("weekday", (day, n, forward), text, answer if n >= 7 else f"{span} is {other}.")


def month_question(rng: Random) -> Question:
    month, n, forward = rng.randrange(12), rng.randint(1, 60), rng.random() < 0.6
    other = _MONTHS[(month + (n if forward else -n)) % 12]
    span = _span(n, "month", forward, _MONTHS[month])
    text = rng.choice((f"What month is {span}?", f"Which month comes {span}?", f"Which month is {span}?"))
    answer = f"{_how_many(n, 'month')} are {_divided(n, 12, 'year', 'month')}, so it is {other}."
    return Question("month", (month, n, forward), text, answer if n >= 12 else f"{span} is {other}.")


def date_question(rng: Random) -> Question:
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
