"""`jaxinfer lm-eval`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from typing import Any

import typer

from jaxinfer.cli.hosts import HostOptions


def lm_eval(context: typer.Context) -> None:
    """Run lm-eval, EleutherAI's evaluation harness, on a model.

    All arguments are lm-eval's own: jaxinfer lm-eval --model_args pretrained=FOLDER --tasks T --num_fewshot 5.
    model_args takes every option of jaxinfer.LLM, and config=FILE, a deployment's file.
    --adapter NAME=DIR evaluates the model with a low-rank adapter in PEFT's format beside its weights.
    --coordinator, --num-processes and --process-id are as of `jaxinfer generate`.
    It comes with the extra "lm-eval".
    """
    arguments = context.args or ["--help"]
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise ValueError(f"lm-eval is not installed ({error}): pip install '.[lm-eval]'") from None
    # Another command of lm-eval (`ls tasks`) comes first, where there is one.
    runs = arguments[0] == "run" or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help"))
    if runs:
        _check_output(arguments)
        arguments = _with_adapter(_joined(arguments))
    import jaxinfer.lm_eval  # noqa: F401  this registers the model

    if runs and not any(argument.split("=")[0] in ("--model", "-M") for argument in arguments):
        arguments = [*arguments, "--model", "jaxinfer"]
    before, sys.argv = sys.argv, ["jaxinfer lm-eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before


def _check_output(arguments: list[str]) -> None:
    """lm-eval makes its output's folder when all is computed, also of a URL: see now whether it can."""
    from jaxinfer.places import check_new, local

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--output_path", "-o")
    output_path = parser.parse_known_args(arguments)[0].output_path
    if output_path is not None:
        path = local(output_path, "--output_path")
        if path.endswith(".json"):  # its name gets a date
            path = os.path.dirname(path)
        check_new(os.path.join(path, ".new") if os.path.lexists(path) else path, f"--output_path {output_path}")


def _with_adapter(arguments: list[str]) -> list[str]:
    """With --adapter among the model's arguments. Raises ValueError."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--adapter", action="append")
    namespace, rest = parser.parse_known_args(arguments)
    if not namespace.adapter:
        return rest
    if len(namespace.adapter) > 1:
        raise ValueError(f"--adapter is given {len(namespace.adapter)} times: one is evaluated at a time")
    return [*rest, "--model_args", json.dumps({"adapter": namespace.adapter[0]})]


def _joined(arguments: list[str]) -> list[str]:
    """Joins the other hosts, if there are any, and returns what is left for lm-eval."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for field in dataclasses.fields(HostOptions):
        parser.add_argument(f"--{field.name.replace('_', '-')}", dest=field.name)
    namespace, rest = parser.parse_known_args(arguments)
    options: dict[str, Any] = {
        name: int(value) if (value or "").isdecimal() else value for name, value in vars(namespace).items()
    }
    HostOptions(**options).join()
    return rest


lm_eval.context_settings = {  # type: ignore[attr-defined]
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "help_option_names": [],
}
