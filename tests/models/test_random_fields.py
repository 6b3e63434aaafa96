"""Random legal values of all fields of each family: honoured, as transformers does, or refused by name."""

import pytest

pytest.importorskip("torch", reason="transformers' models are the judge")

from jaxinfer.models.registry import model_types
from tests.models.random_fields import Result, run, share, table

SOME = 3  # of each family


@pytest.fixture(autouse=True)
def quiet():
    import transformers

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()
    transformers.logging.set_verbosity(verbosity)


def check(family: str, results: list[Result]) -> None:
    found = share(family, results)
    assert not found.problems, "\n".join(found.problems)
    assert found.discarded < found.cases
    assert found.fields.keys() <= table()[family]["fields"].keys(), "refused, and was not before"


@pytest.mark.slow
@pytest.mark.parametrize("family", model_types())
def test_some(family):
    check(family, [run(family, index) for index in range(SOME)])


@pytest.mark.long
@pytest.mark.parametrize("family", model_types())
def test_all(family):
    """What is refused may not grow, and each field has two values that are honoured."""
    before = table()[family]
    found = share(family, [run(family, index) for index in range(before["cases"])])
    assert not found.problems, "\n".join(found.problems)
    assert not found.few
    assert found.discarded <= before["discarded"]
    assert found.refused <= before["refused"]
    assert all(times <= before["fields"].get(name, 0) for name, times in found.fields.items()), found.fields
