"""`jaxinfer plan`."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxinfer.cli.bench import BatchingOptions
from jaxinfer.cli.options import JSON, AdapterOptions, ModelOptions, Verbosity, grouped

if TYPE_CHECKING:
    from jaxinfer.cli.console import Progress
    from jaxinfer.engine.config import EngineConfig
    from jaxinfer.engine.deployment import Deployment
    from jaxinfer.plan.slices import Slice


@grouped
def plan(
    what: Annotated[
        str | None,
        typer.Argument(metavar="CONFIG.yaml|MODEL", help="A deployment; or a folder with a config.json, or that."),
    ] = None,
    *,
    topology: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A TPU slice: v5e-8, v6e-4, v5p-8, v4-8, tpu7x-4 ...; or GPUs: h100-4."),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Tokens of each sequence, for the bounds of speed; without it 1024, or as many as the model takes.",
        ),
    ] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Rank slices and meshes, or the meshes of --topology, from shapes.")
    ] = False,
    plot: Annotated[
        str | None, typer.Option(metavar="FILE.png", help="Draw the bounds of decoding over the batch size.")
    ] = None,
    profile: Annotated[
        bool,
        typer.Option("--profile", help="Say what each operation takes by the TPU compiler's own estimates: minutes."),
    ] = False,
    profile_rows: Annotated[
        list[int] | None,
        typer.Option(metavar="N", min=1, help="Rows of a step to profile; may be given again. Default: max_num_seqs."),
    ] = None,
    profile_tokens: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Tokens of prompts to profile, likewise. Default: max_num_batched_tokens.",
        ),
    ] = None,
    as_json: JSON = False,
    batching: BatchingOptions,
    load: ModelOptions,
    adapters: AdapterOptions,
    verbosity: Verbosity,
) -> None:
    """Say whether a model fits a TPU slice, and how fast it can be at best. No TPU and no weights are needed.

    The TPU compiler itself, which comes with the extra "tpu", compiles the engine's programs and says how much
    memory they need; with --sweep, and for GPUs, all is computed from shapes. Exit code 1, and what would fit,
    if the model does not. Where nobody says a dtype it is
    bfloat16, and float16 on a T4.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # there may be a TPU, and somebody at work on it
    if "compiled" in load.options:
        raise ValueError("--compiled is for commands that run a model: a plan compiles anew")
    load, deployment = named(what, load)
    model, options = load.loading(**batching.options, **adapters.loading)
    if sweep and "mesh" in load.options:
        raise ValueError("--sweep tries all meshes: leave --mesh out")
    if plot is not None:
        from jaxinfer.plan.plot import check_plot

        check_plot(plot)
        if sweep:
            raise ValueError("--plot draws one plan, and --sweep makes many: give only one of them")
    if (profile_rows or profile_tokens) and not profile:
        raise ValueError("--profile-rows and --profile-tokens are of --profile, which is not given")
    if profile and sweep:
        raise ValueError("--profile is of one plan, and --sweep makes many: give only one of them")
    with verbosity.apply() as progress:
        progress("starting JAX")
        from jaxinfer.models.tasks import GENERATE, wanted_task
        from jaxinfer.plan.fit import DoesNotFit

        config = architecture(model, deployment)
        topology = topology or (None if sweep or deployment is None else deployment.topology)
        try:
            if wanted_task(config) != GENERATE:
                if plot is not None:
                    raise ValueError("--plot draws the bounds of decoding, and the model makes no text: leave it out")
                if profile:
                    raise ValueError("--profile is of models that make text, and this one makes none: leave it out")
                _plan_pooled(model, config, topology, sweep, context, as_json, options, progress)
                return
            if sweep:
                _sweep(config, topology, context, as_json, options)
                return
            profiled = (profile_rows, profile_tokens) if profile else None
            figures = _plan(config, topology, context, profiled, options, progress)
        except DoesNotFit as error:
            from jaxinfer.cli.console import say_error

            progress.hide()
            say_error(error)
            raise typer.Exit(1) from None
    if plot is not None:
        from jaxinfer.plan.plot import plot as draw

        draw(figures, plot)
    if as_json:
        print(json.dumps(figures))
    else:
        from jaxinfer.cli.plan_tables import print_plan

        print_plan(figures)


def _plan(
    config: Mapping[str, Any],
    topology: str | None,
    context: int | None,
    profiled: tuple[list[int] | None, list[int] | None] | None,
    options: EngineConfig,
    progress: Progress,
) -> dict[str, Any]:
    from jaxinfer.plan.compile import make_plan
    from jaxinfer.plan.figures import context_of, figures
    from jaxinfer.plan.fit import fit_config
    from jaxinfer.plan.profile import check_profile, profile

    held = fit_config(config, _target(topology), **options)
    context = context_of(held.model.config, context, options)  # refused before a minute of compiling
    if profiled is not None:
        check_profile(held, *(own or [] for own in profiled))
    progress(f"compiling for {topology}, which may take a minute")
    plan = make_plan(held)
    if profiled is None:
        return figures(plan, context)

    def on_program(name: str) -> None:
        progress(f"compiling {name}, for {topology}, with its code written down")

    rows, tokens = profiled[0] or [held.max_num_seqs], profiled[1] or [held.max_num_batched_tokens]
    return figures(plan, context) | {"profile": profile(held, config, options, context, rows, tokens, on_program)}


def _target(topology: str | None) -> Slice:
    from jaxinfer.plan.targets import find_target

    if topology is None:
        raise ValueError("topology is missing: give --topology v5e-8, or say it in a deployment's file")
    return find_target(topology)


def _plan_pooled(
    model: str | os.PathLike[str],
    config: Mapping[str, Any],
    topology: str | None,
    sweep: bool,
    context: int | None,
    as_json: bool,
    options: EngineConfig,
    progress: Progress,
) -> None:
    """Of a model that makes vectors or classes."""
    from jaxinfer.cli.plan_tables import print_pooled, print_pooled_sweep
    from jaxinfer.plan.pooled import opened_for, pooled_figures, pooled_sweep
    from jaxinfer.plan.sweep import places

    opened = opened_for(model, config, options)
    if sweep:
        candidates, refused = pooled_sweep(opened, places() if topology is None else [topology], context)
        print(json.dumps(candidates)) if as_json else print_pooled_sweep(candidates, refused)
        return
    target = _target(topology)
    progress(f"compiling for {topology}, which may take a minute")
    figures = pooled_figures(opened, target, context)
    print(json.dumps(figures)) if as_json else print_pooled(figures)


def _sweep(
    config: Mapping[str, Any], topology: str | None, context: int | None, as_json: bool, options: EngineConfig
) -> None:
    from jaxinfer.cli.plan_tables import print_sweep
    from jaxinfer.plan.figures import context_of
    from jaxinfer.plan.fit import DoesNotFit, model_of
    from jaxinfer.plan.sweep import places, sweep

    asked = options.get("quantization"), options.get("max_model_len")
    model = model_of(config, options.get("dtype", "auto"), None, *asked)
    context = context_of(model.config, context, options)
    candidates, refused = sweep(model, places() if topology is None else [topology], context, **options)
    if not candidates:
        raise DoesNotFit(f"none of {refused} meshes fits: a shorter max_model_len, or a smaller --context")
    if as_json:
        entries = [
            {"topology": candidate.fit.target.name, "mesh": candidate.fit.mesh, "rows": candidate.rows}
            | candidate.bound
            for candidate in candidates
        ]
        print(json.dumps(entries))
    else:
        print_sweep(candidates, refused, context)


def named(what: str | None, load: ModelOptions) -> tuple[ModelOptions, Deployment | None]:
    """The argument as the option that it stands for; and the deployment, if it is one."""
    if "revision" in load.options:
        raise ValueError("--revision is of a model on the hub, and nothing is downloaded here: give a model's folder")
    if what is not None:
        is_config = Path(what).suffix in (".yaml", ".yml")
        if (load.config if is_config else load.model) is not None:
            option = "--config" if is_config else "--model"
            raise ValueError(f"both {what} and {option} are given: give only one of them")
        load = dataclasses.replace(load, config=what) if is_config else dataclasses.replace(load, model=what)
    if load.config is None and load.model is None:
        raise ValueError("no model is named: give CONFIG.yaml, or a model's folder and --topology")
    if load.config is None:
        return load, None
    from jaxinfer.engine.deployment import read_deployment

    return load, read_deployment(load.config)


def architecture(model: str | os.PathLike[str], deployment: Deployment | None) -> Mapping[str, Any]:
    """The content of a config.json: the deployment's, or of the model's folder, and as its weights are where there are
    some. Nothing is downloaded."""
    from jaxinfer.checkpoint.open import open_weights
    from jaxinfer.checkpoint.settle import as_stored
    from jaxinfer.engine.loading import check_architecture, open_model
    from jaxinfer.models.registry import parse_config, task_of
    from jaxinfer.models.tasks import GENERATE, with_task
    from jaxinfer.models.wrapped import TIED, untied, with_text

    declared = deployment.architecture if deployment else None
    path = Path(model).expanduser()
    folder = path.parent if path.name == "config.json" else path
    if declared is None or folder.is_dir():
        if deployment is not None and not folder.exists():
            raise ValueError(f"{deployment.path}: architecture is missing, and {model} is no folder with a config.json")
        opened = open_model(folder)  # the model itself may be in a folder of its own
        folder, config = opened.folder, opened.config
        try:
            with open_weights(folder) as weights:
                config = as_stored(config, weights)
        except (OSError, ValueError):  # none are needed: then config.json is all that there is
            if declared is not None and with_text(declared).get(TIED) is False:  # which only they may say
                config = untied(config)
        if declared is not None:
            check_architecture(declared, config, folder / "config.json")
        return config if opened.task == GENERATE else with_task(config, opened.task)
    assert deployment is not None
    if (task := task_of(declared)) != GENERATE:
        declared = with_task(declared, task)
    try:
        parse_config(declared)
    except ValueError as error:
        raise deployment.wrong_architecture(error) from None
    return declared
