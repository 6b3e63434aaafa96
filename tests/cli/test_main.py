"""The command line as a whole: what it imports, its errors, its exit codes."""

import json
import os
import subprocess
import sys

import pytest
import typer
from rich.text import Text

import jaxinfer
from jaxinfer.aliases.loading import VALUES
from jaxinfer.cli import COMMANDS, absent_tpu, app
from jaxinfer.cli.options import ModelOptions
from jaxinfer.models.registry import STATIC, encoder_types, model_types


def test_help_imports_nothing_heavy():
    code = """
import sys, jaxinfer, jaxinfer.models.registry
from jaxinfer.cli import main
for arguments in ([], ["--help"], ["generate", "--help"], ["chat", "--help"], ["bench"], ["bench", "latency", "--help"],
                  ["batch", "--help"],
                  ["score", "--help"], ["plan", "--help"], ["models"], ["models", "--json"], ["--version"]):
    assert main(arguments) == 0, arguments
heavy = {"jax", "jaxlib", "flax", "transformers", "torch", "tokenizers", "numpy", "huggingface_hub"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(name in done.stdout for name in COMMANDS)


def test_generation_imports_neither_torch_nor_transformers(model):
    code = f"""
import sys
from jaxinfer.cli import main
assert main(["generate", "hello", "--model", {str(model)!r}, "--max-tokens", "2"]) == 0
assert not {{"torch", "transformers"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout) >= 2


def test_version(cli):
    assert cli("--version") == (0, f"{jaxinfer.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "same"),
    [
        (["-h"], ["--help"]),
        (["help"], ["--help"]),
        (["help", "compare"], ["compare", "--help"]),
        (["bench", "latency", "-h"], ["bench", "latency", "--help"]),
        (["help", "bench", "latency"], ["bench", "latency", "--help"]),
    ],
)
def test_ways_to_ask_for_help(cli, arguments, same):
    code, out, err = cli(*arguments)
    assert (code, err) == (0, "")
    assert out == cli(*same).out
    assert "Usage: jaxinfer" in out


def test_help_shows_what_is_in_brackets(cli):
    """To rich they are markup: what is no style vanishes."""

    def texts(command):
        yield command.help or ""
        for parameter in command.params:
            yield getattr(parameter, "help", None) or ""
        for subcommand in getattr(command, "commands", {}).values():
            yield from texts(subcommand)

    help_texts = list(texts(typer.main.get_command(app)))
    assert len(help_texts) > 200
    for text in help_texts:
        assert Text.from_markup(text).plain == text.replace("\\[", "[")
    assert "'.[plot]'" in cli("compare", "--help").out


@pytest.mark.parametrize(
    ("guess", "fact"),
    [
        ("api", "did you mean jaxinfer serve?"),
        ("pull", "a model is downloaded when it is first used"),
        ("download", "jaxinfer generate --model"),
        ("ls", "jaxinfer models"),
        ("list", "jaxinfer models"),
        ("run", "did you mean jaxinfer generate"),
        ("complete", "did you mean jaxinfer generate?"),
        ("eval", "jaxinfer lm-eval"),
        ("benchmark", "jaxinfer bench throughput"),
        ("encode", "did you mean jaxinfer embed?"),
        ("generat", "Did you mean 'generate'?"),
    ],
)
def test_guesses_of_commands(cli, guess, fact):
    line = cli(guess, "--model", "x").error()
    assert fact in line, line
    assert f"{guess!r}" in line


def test_shell_completion():
    environment = os.environ | {"_JAXINFER_COMPLETE": "complete_bash", "COMP_WORDS": "jaxinfer gen", "COMP_CWORD": "1"}
    done = subprocess.run([sys.executable, "-m", "jaxinfer"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["generate"], "")


def test_models(cli):
    code, out, err = cli("models", "--json")
    assert (code, err) == (0, "")
    rows = json.loads(out)
    for makes, types in (("text", model_types()), ("vectors", [*encoder_types(), STATIC])):
        assert list(dict.fromkeys(row["model_type"] for row in rows if row["makes"] == makes)) == types
    assert {row["model_type"]: row["hf_class"] for row in json.loads(out)}["llama"] == "LlamaForCausalLM"
    table = cli("models")
    assert all(name in table.out for name in (*model_types(), *encoder_types()))


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["frobnicate"], ["'frobnicate'", "jaxinfer --help"]),
        (["generate", "x", "--frobnicate"], ["--frobnicate", "jaxinfer generate --help"]),
        (["generate", "x", "--max-tokens", "many"], ["--max-tokens", "integer"]),
        (["generate", "x", "--max-tokens"], ["--max-tokens", "requires an argument"]),
        (["generate", "x", "--dtype", "int8"], ["--dtype", "int8", "bfloat16"]),
        (["models", "extra"], ["extra"]),
    ],
)
def test_mistakes_are_one_line(cli, arguments, facts):
    line = cli(*arguments).error()
    assert all(fact in line for fact in facts), line


@pytest.mark.parametrize("name", VALUES)
def test_values_are_spelt_as_llm_takes_them(cli, name):
    for spelling, ours in {**VALUES[name], "auto": "auto"}.items():
        assert "nowhere" in cli("generate", "x", "-m", "/nowhere", f"--{name.replace('_', '-')}", spelling).error()
        assert ModelOptions(options={name: spelling}).loading()[1] == {name: ours}


@pytest.mark.parametrize(
    ("there", "alone"),
    [
        ({"libtpu"}, True),
        ({"libtpu", "/sys/bus/pci/devices/*/vendor"}, False),
        ({"libtpu", "/dev/vfio/[0-9]*"}, False),
        ({"libtpu", "/dev/nvidia*"}, False),
        ({"libtpu", "jax_plugins"}, False),
        ({"libtpu", "TPU_WORKER_ID"}, False),
        ({"libtpu", "JAX_PLATFORMS"}, False),
        (set(), False),
    ],
    ids=lambda value: "-".join(sorted(value)).replace("/", "_") if isinstance(value, set) else "",
)
def test_libtpu_is_left_alone_without_a_tpu(monkeypatch, tmp_path, there, alone):
    """Where nothing says that there may be an accelerator."""
    (tmp_path / "vendor").write_text("0x1ae0\n")
    environment = {name: "" for name in there if name.isupper()}
    monkeypatch.setattr(absent_tpu.os, "environ", environment)
    monkeypatch.setattr(absent_tpu, "glob", lambda pattern: [str(tmp_path / "vendor")] if pattern in there else [])
    monkeypatch.setattr(absent_tpu, "find_spec", lambda name: name if name in there else None)
    monkeypatch.setattr(absent_tpu, "entry_points", lambda group: [])
    absent_tpu.leave_absent_tpu_alone()
    assert (environment.get("JAX_PLATFORMS") == "cpu") == alone


@pytest.mark.slow
def test_libtpu_says_nothing_without_a_tpu():
    pytest.importorskip("libtpu")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(absent_tpu.SAID)}
    command = [sys.executable, "-m", "jaxinfer", "generate", "What is 27 + 45?"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    assert "TPU_" not in done.stderr


def test_a_bug_keeps_its_traceback(cli, monkeypatch):
    monkeypatch.setattr("jaxinfer.cli.generate._texts", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli("generate", "x")


@pytest.mark.parametrize("arguments", [["--version"], ["models", "--json"], ["models"]])
def test_nobody_reads_the_output(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "jaxinfer", *arguments]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")
