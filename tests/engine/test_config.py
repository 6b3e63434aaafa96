"""EngineConfig: the one declaration of options, and all that derives from it."""

import inspect
from pathlib import Path
from typing import get_args

import pytest

from jaxinfer.aliases.loading import VALUES
from jaxinfer.cli.bench import BatchingOptions
from jaxinfer.cli.options import ModelOptions, grouped
from jaxinfer.engine.compiled import OPTIONS as SHAPING
from jaxinfer.engine.config import OPTIONS, EngineConfig, check_options, which
from jaxinfer.engine.follower import HERE
from tests.refusals import line

DOCUMENT = Path(__file__).parents[2] / "docs" / "options.md"


def table() -> str:
    """As docs/options.md is to have it."""
    rows = [f"| `{name}` | {declared.option.details or declared.option.help} |" for name, declared in OPTIONS.items()]
    return "\n".join(["| option | meaning |", "|---|---|", *rows]) + "\n"


def test_the_documentation_has_every_option():
    text = DOCUMENT.read_text()
    there = text[text.index("| option |") :].split("\n\n")[0] + "\n"
    assert there == table()


def test_options_of_the_command_line_have_the_declared_types():
    @grouped
    def command(*, batching: BatchingOptions, load: ModelOptions) -> None: ...

    parameters = inspect.signature(command).parameters
    shown = {name: parameter for name, parameter in parameters.items() if name in OPTIONS}
    assert {*parameters} - {*shown} == {"model", "config"}
    for name, parameter in shown.items():
        (kind, option), declared = get_args(parameter.annotation), OPTIONS[name]
        assert parameter.default is None
        assert option.help == declared.option.help != ""
        *kinds, none = get_args(kind)
        assert none is type(None)
        if declared.choices:
            assert get_args(kinds[0]) == (*declared.choices, *VALUES.get(name, ()))
            assert option.metavar is None
        else:
            assert set(kinds) <= set(declared.kinds)
            assert option.metavar == declared.option.metavar


def test_defaults_are_right_themselves():
    assert check_options({}) == {name: declared.option.default for name, declared in OPTIONS.items()}
    assert list(OPTIONS) == list(EngineConfig.__annotations__)


def test_what_is_known_of_options():
    assert {*OPTIONS} - {*which(is_data=True)} == {"token", "on_progress"}
    assert which(none_is_default=True) == ("enable_prefix_caching", "seed")  # as in vLLM
    assert set(HERE) == {"token", "on_progress", "tokenizer", "skip_tokenizer_init"}
    assert {name for name in OPTIONS if name not in SHAPING} == {
        *("kv_cache_memory", "memory_utilization", "enable_prefix_caching", "warmup", "compiled", "revision", "token"),
        *("tokenizer", "skip_tokenizer_init", "architecture", "seed", "on_progress"),
        *("runner", "convert", "pooler_config", "hf_overrides", "adapters", "max_host_adapters"),
    }


@pytest.mark.parametrize(
    ("name", "fine", "wrong", "wanted"),
    [
        ("dtype", ["float16"], ["int8", None], "one of auto, float32, bfloat16, float16"),
        ("quantization", ["int8", {"*": "none"}, None], ["int9", {}, 8], "one of int8, "),
        ("max_model_len", [2, None], [1, 2.0, True, "8"], "an integer of at least 2"),
        ("kv_cache_memory", [1, 2**70, None], [0, 1.5], "an integer of at least 1"),
        ("max_num_seqs", [1, 4096, None], [0, 4097], "an integer from 1 to 4096"),
        ("seed", [0, None], [-1, 2**31, True, 1.0], "an integer from 0 to 2147483647"),
        ("memory_utilization", [1, 0.5], [0, 1.5, float("nan"), True, "0.5", None], "a number above 0 and at most 1"),
        ("runner", ["auto", "pooling"], ["draft", None, True], "one of auto, generate, pooling"),
        ("convert", ["none", "embed"], ["reward"], "one of auto, none, embed, classify"),
        (
            "pooler_config",
            [{"pooling_type": "CLS"}, None],
            [{"pooling_type": "SUM"}, {}, 5],
            "a dict with pooling_type",
        ),
        ("warmup", [True, False], [1, "yes", None], "true or false"),
        ("mesh", ["tensor=4", None], [4], "a string such as tensor=4"),
        ("tokenizer", ["x", Path("x"), None], [4], "a folder or a hub id"),
        ("token", ["x", True, None], [4], "a string, true or false"),
        ("adapters", [{"a": "x", "b": Path("x")}, None], [{"a": 5}, {"": "x"}, ["x"]], "a dict of names and folders"),
        ("max_adapters", [1, 256, None], [0, 257, True], "an integer from 1 to 256"),
        ("architecture", [{}, None], ["llama", [1]], "fields of a config.json"),
        ("on_progress", [print, None], ["print"], "a function of a string"),
    ],
)
def test_checks(name, fine, wrong, wanted):
    for value in fine:
        default = OPTIONS[name].option.default
        assert check_options({name: value})[name] == (default if value is None else value)
    for value in wrong:
        text = line(lambda value=value: check_options({name: value}))
        assert text.startswith(f"{name} is {value!r}: it must be {wanted}")


def test_the_command_line_refuses_the_same(cli):
    assert "max_num_seqs is 0: it must be an integer from 1" in cli("generate", "x", "--max-num-seqs", 0).error()
