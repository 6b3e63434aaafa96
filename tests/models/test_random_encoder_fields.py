"""Random legal values of all fields of each encoder: honoured, as transformers does, or refused by name."""

import pytest

pytest.importorskip("torch", reason="transformers' models are the judge")

from tests.models.random_encoder_fields import encoder_families, run, summary, table
from tests.models.test_random_fields import quiet

__all__ = ["quiet"]


def check(family: str, cases: int) -> None:
    results = [run(family, index) for index in range(cases)]
    problems = [result.problem for result in results if result.problem]
    assert not problems, "\n".join(problems)
    found, before = summary(results), table()[family]
    assert found["discarded"] <= before["discarded"]
    assert all(times <= before["fields"].get(name, 0) for name, times in found["fields"].items()), found


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(encoder_families()))
def test_one(family):
    check(family, 1)


@pytest.mark.long
@pytest.mark.parametrize("family", sorted(encoder_families()))
def test_all(family):
    """What is refused may not grow."""
    check(family, table()[family]["cases"])
