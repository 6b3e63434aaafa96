"""What docs/deploy has for those who run a server: that it names what there is."""

import configparser
import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from jaxinfer.engine.stats import EngineStats
from jaxinfer.server.metrics import Metrics

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "docs" / "deploy"


@pytest.fixture(scope="module")
def options():
    """Those of `jaxinfer serve`."""
    import typer

    from jaxinfer.cli import app

    command = typer.main.get_command(app)
    (serve,) = [command.get_command(None, "serve")]
    return {option for parameter in serve.params for option in (*parameter.opts, *parameter.secondary_opts)}


def given(words):
    return {word for word in words if word.startswith("--")}


def test_the_unit(options):
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str
    unit.read(DEPLOY / "jaxinfer.service")
    program, command, *words = shlex.split(unit["Service"]["ExecStart"])
    assert (Path(program).name, command) == ("jaxinfer", "serve")
    assert given(words)
    assert given(words) <= options
    seconds = words[words.index("--drain-seconds") + 1]
    assert float(unit["Service"]["TimeoutStopSec"]) > float(seconds)


def test_the_image(options):
    text = (DEPLOY / "Dockerfile").read_text()
    (entry,) = re.findall(r"^ENTRYPOINT (.+)$", text, re.MULTILINE)
    program, command, *words = json.loads(entry)
    assert (program, command) == ("jaxinfer", "serve")
    assert given(words) <= options
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {name for names in re.findall(r"EXTRAS=(\S+)", text) for name in names.rstrip(",").split(",")} <= set(extras)
    copied = {name for names in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for name in names.split()}
    # Not looked for in the tree: an installed package is tested without it.
    copied.remove("jaxinfer")
    assert copied
    assert all((ROOT / name).exists() for name in copied)


def test_the_dashboard():
    board = json.loads((DEPLOY / "grafana.json").read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked.append(board["templating"]["list"][1]["query"])
    metrics = Metrics()
    metrics.http["/", "GET", 200] += 1
    there = set(re.findall(r"^([\w:]+)[{ ]", metrics.text("m", EngineStats()), re.MULTILINE))
    named = {name for text in asked for name in re.findall(r"(?:vllm:|http_)\w+", text)}
    assert len(named) > 10
    assert named <= there
