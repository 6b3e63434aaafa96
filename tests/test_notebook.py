"""docs/colab.ipynb runs, cell by cell, as it stands; what it installs is what is tested."""

import json
import re
import sys

from tests.test_readme import DRIVER, ROOT, run, same

NOTEBOOK = json.loads((ROOT / "docs/colab.ipynb").read_text(encoding="utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
INSTALL = re.compile(r"%pip install --quiet \./jaxinfer\n?")
PRINTED = (
    "[Cpu...]",
    "27 + 45 = 72.",
    "Add 3 and 4. → ...7... What is 50 - 8? → 50 - 8 = 42. What is 120 + 130? → 120 + 130 = 250.",
    "27 + 45 = 72.",
    "50 - 8 = 42.",
    "-... -... True",
    "",
)


def test_it_is_a_notebook_without_outputs():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"])
    for cell in NOTEBOOK["cells"]:
        assert cell["cell_type"] in ("code", "markdown")
        assert all(isinstance(line, str) for line in cell["source"])
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CODE)


def test_every_cell_runs(tmp_path):
    install, *cells = ["".join(cell["source"]) for cell in CODE]
    assert INSTALL.fullmatch(install)
    *printed, rest = run([sys.executable, "-c", DRIVER, *cells], tmp_path).split("\0")
    assert not rest
    for shown, output in zip(PRINTED, printed, strict=True):
        assert same(shown, output), output
