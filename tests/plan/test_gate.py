"""Programs cost no more than they did, by the TPU compiler's own account."""

import json
from importlib.metadata import version

import pytest

from tests.plan.gate import FILE, PROGRAMS, costs, worse


def test_what_costs_more_is_named():
    before = {"p": {"a": {"cycles": 100_000, "bundles": 50}, "b": {"cycles": 10, "bundles": 0}}}
    assert worse(before, before) == []
    now = {"p": {"a": {"cycles": 103_100, "bundles": 60}, "b": {"cycles": 900, "bundles": 0}}}
    assert worse(now, before) == ["p: a: 103,100 cycles, where it had 100,000"]
    now["p"] = {"a": {"cycles": 102_900, "bundles": 1100}, "c": {"cycles": 1001, "bundles": 0}}
    assert worse(now, before) == ["p: a: 1,100 bundles, where it had 50", "p: c: 1,001 cycles, where it had 0"]


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_cost_no_more(name):
    pytest.importorskip("libtpu")
    kept, libtpu = json.loads(FILE.read_text()), version("libtpu")
    if libtpu not in kept:
        pytest.skip(f"cycles.json has no libtpu {libtpu}: python -m tests.plan.gate writes it")
    assert (lines := worse(costs(name), kept[libtpu])) == [], "\n".join(lines)
