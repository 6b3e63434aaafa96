"""README.md and docs/ say what works: every block of code in them runs as written, and prints what it shows."""

import doctest
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from jaxinfer.demo import MODEL_DIR

ROOT = Path(__file__).parents[1]
PAGES = {
    path.name: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
BLOCKS = {name: re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL) for name, text in PAGES.items()}
PYTHON = {name: [code for language, code in blocks if language == "python"] for name, blocks in BLOCKS.items()}
SHELL = [code for blocks in BLOCKS.values() for language, code in blocks if language in ("bash", "console")]

STAND_INS = ("my-model", "Qwen/Qwen3-0.6B")  # folders come before hub ids: here they are the packaged model
SLOW = (
    "python -m",
    "jaxinfer compare",
    "jaxinfer plan",
    "jaxinfer quantize",
    "my-deployment",
    "my-programs",
    "texts.jsonl",
)
TRAINING = "python -m jaxinfer.demo.train"

# Python blocks are run one after the other in one process, as in a notebook.
DRIVER = """
import sys
namespace = {"__name__": "__main__"}
for number, code in enumerate(sys.argv[1:], 1):
    exec(compile(code, f"Python block {number}", "exec"), namespace)
    print("\\0", end="", flush=True)
"""


def shell_commands() -> list[tuple[str, str | None]]:
    """Each command and, in console blocks, what it prints."""
    commands: list[tuple[str, str | None]] = []
    for code in SHELL:
        if code.startswith("$ "):
            for part in re.split(r"^\$ ", code, flags=re.MULTILINE)[1:]:
                command, _, output = part.partition("\n")
                commands.append((command, output))
        else:
            commands += [(line, None) for line in code.splitlines()]
    return commands


def same(shown: str, printed: str) -> bool:
    """Equal up to white space, with `...` for anything."""
    return doctest.OutputChecker().check_output(shown, printed, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the models that the README names."""
    folder = tmp_path_factory.mktemp("readme")
    for name in STAND_INS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(MODEL_DIR, target_is_directory=True)
    return folder


def run(command: list[str], folder: Path) -> str:
    """What a command prints on stdout, as a user has it: without the hostile settings of the tests."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("page", [name for name, blocks in PYTHON.items() if blocks])
def test_python_blocks(page, folder):
    *printed, rest = run([sys.executable, "-c", DRIVER, *PYTHON[page]], folder).split("\0")
    assert not rest
    for code, output in zip(PYTHON[page], printed, strict=True):
        shown = re.findall(r"^ *print\(.*\)  # (.*)", code, re.MULTILINE)
        if shown:
            assert same("\n".join(shown), output)


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        pytest.param(
            command, shown, id=command, marks=[pytest.mark.slow] if any(slow in command for slow in SLOW) else []
        )
        for command, shown in shell_commands()
    ],
)
def test_shell_commands(command, shown, folder):
    install = re.match(r"pip install '?\.(?:\[(.*?)\])?'?(?: && |$)", command)
    if install:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert not install[1] or install[1] in extras
        command = command[install.end() :]
    if command in ("", "pytest"):  # which is running
        return
    assert re.match(r"""jaxinfer |echo (".*"|'.*') (\| jaxinfer |>>? \w)|python (-m jaxinfer|-c )""", command)
    if command.startswith(TRAINING):
        command += " --steps 1"  # of 12,000
    if command.startswith("jaxinfer plan"):
        pytest.importorskip("libtpu")  # of the extra `tpu`
    printed = run(["bash", "-c", command], folder)
    if shown is not None:
        assert same(shown, printed), printed


def test_what_is_shown_is_all_there():
    """Blocks of any other kind would not be run."""
    for name, blocks in BLOCKS.items():
        assert {language for language, _ in blocks} <= {"python", "bash", "console"}
        assert PAGES[name].count("```") == 2 * len(blocks)


def test_the_readme_is_short():
    """The rest is in docs/."""
    assert len(PAGES["README.md"].split()) <= 1200


def test_links_lead_somewhere():
    for file in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)", file.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (file.parent / target).exists(), f"{file.name}: {target}"
