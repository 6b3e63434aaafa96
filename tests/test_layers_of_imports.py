"""A file imports only from lower layers, and never sideways into another folder of its own layer: those of the table in
docs/architecture.md."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

import jaxinfer

ROOT = Path(jaxinfer.__file__).parent
TABLE = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text()
LAYER = {name: int(level) for level, name in re.findall(r"^\| (\d+) \| `(\w+)(?:\.py|/)` \|", TABLE, re.MULTILINE)}
LAYER["__version__"] = 0
FILES = sorted(ROOT.rglob("*.py"))


def imported(file: Path) -> list[tuple[str, int]]:
    """(module, line) of every import, inside functions and TYPE_CHECKING too."""
    imports = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            imports += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}:{node.lineno}: imports are absolute here"
            imports += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return imports


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_come_from_below(file):
    own = file.relative_to(ROOT).parts[0].removesuffix(".py")
    for module, line in imported(file):
        assert module.split(".")[0] != "torch", f"{file}:{line}: torch is for tests and benchmarks only"
        top, name, *_ = [*module.split("."), "__init__"]
        if top != "jaxinfer" or name == own:
            continue
        other = jaxinfer._HOME.get(name, f"jaxinfer.{name}").split(".")[
            1
        ]  # `from jaxinfer import LLM` imports jaxinfer.llm
        assert LAYER[other] < LAYER[own], f"{file}:{line}: {own} (layer {LAYER[own]}) imports {other}, not below it"


def test_no_cycle_of_files():
    """Not even by an import inside a function."""
    names = {
        ".".join(file.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): file for file in FILES
    }
    graph = {name: {first_of(module, names) for module, _ in imported(file)} for name, file in names.items()}
    for name, below in graph.items():
        below -= {name, "jaxinfer", None}  # the package looks its names up when they are used
    list(graphlib.TopologicalSorter(graph).static_order())


def first_of(module, names):
    """The file of ours that a module is, or that a name of one is in."""
    while module and module not in names:
        module = module.rpartition(".")[0]
    return module or None


def test_every_folder_has_a_layer_and_every_layer_a_folder():
    named = {file.relative_to(ROOT).parts[0].removesuffix(".py") for file in FILES}
    assert named == set(LAYER) - {"__version__"}
