"""`jaxinfer compile`."""

from __future__ import annotations

import dataclasses
import json
import os
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxinfer import distributed
from jaxinfer.cli.bench import BatchingOptions
from jaxinfer.cli.hosts import HostOptions
from jaxinfer.cli.options import JSON, AdapterOptions, ModelOptions, Verbosity, grouped
from jaxinfer.cli.plan import architecture, named

if TYPE_CHECKING:
    from jaxinfer.engine.programs import ModelPrograms
    from jaxinfer.engine.sizing import Sizes
    from jaxinfer.plan.slices import Slice


@grouped
def compile(
    what: Annotated[
        str | None,
        typer.Argument(metavar="CONFIG.yaml|MODEL", help="A deployment; or a folder with a config.json, or that."),
    ] = None,
    *,
    output: Annotated[str, typer.Option("--output", "-o", metavar="DIR", help="A new folder, or a URL: gs://...")],
    topology: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="A TPU slice that need not be there: v5e-8 ...; without it, this machine's devices."
        ),
    ] = None,
    as_json: JSON = False,
    batching: BatchingOptions,
    load: ModelOptions,
    adapters: AdapterOptions,
    hosts: HostOptions,
    verbosity: Verbosity,
) -> None:
    """Compile all programs of a model ahead, into a folder for `--compiled` and LLM(..., compiled=DIR).

    No weights are needed, and no TPU: the TPU compiler comes with the extra "tpu". The folder is as trusted as code:
    use only one whose maker you trust. Exit code 1, and what would fit, if the model does not fit the slice.
    """
    from tqdm import tqdm

    from jaxinfer.places import check_kept

    if "compiled" in load.options:
        raise ValueError("--compiled is what other commands take; here it is --output")
    check_kept(output, "output")
    load, deployment = named(what, load)
    topology = topology or (deployment.topology if deployment else None)
    if topology is not None:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # there may be a TPU, and somebody at work on it
    if topology is not None and hosts != HostOptions():
        raise ValueError(f"topology is {topology!r}: that is compiled for by one process, without --coordinator")
    model, options = load.loading(**batching.options, **adapters.loading)
    with verbosity.apply() as progress:
        progress("starting JAX")
        config = architecture(model, deployment)
        follows = topology is None and hosts.join()
        from jaxinfer.plan.fit import DoesNotFit
        from jaxinfer.plan.ship import check_folder, ship

        if not follows:
            check_folder(output)
        try:
            programs, sizes, checked = _programs(model, config, topology, options)
            if follows and (group := distributed.group()):
                group.receive()  # until process 0 has compiled for all: this raises SystemExit then
            progress.hide()
            count = len(programs.keys())
            with checked, tqdm(total=count, desc="Compiled", disable=verbosity.quiet or None) as bar:
                done = ship(programs, sizes, output, bar.update)
        except DoesNotFit as error:
            from jaxinfer.cli.console import say_error

            progress.hide()
            say_error(error)
            raise typer.Exit(1) from None
    packages = ("jax", "jaxlib", *(("libtpu",) if topology else ()))
    needs = " ".join(f"{name}=={version(name)}" for name in packages)
    if as_json:
        print(json.dumps({"output": output, "topology": topology, **dataclasses.asdict(done), "needs": needs}))
    else:
        print(f"{done.programs} programs, {done.bytes:,} bytes, in {done.seconds:.0f} s: {output}")
        print(f"needs: {needs}")


def _programs(
    model: Any, config: Any, topology: str | None, options: Any
) -> tuple[ModelPrograms, Sizes | None, AbstractContextManager[None]]:
    """For a slice, or for what there is here; and what turns a compiler's refusal into DoesNotFit."""
    from jaxinfer.models.tasks import GENERATE, wanted_task

    if wanted_task(config) != GENERATE:
        return _pooling_programs(model, config, topology, options), None, nullcontext()
    if topology is None:
        from jaxinfer.engine.load import local_programs

        return *local_programs(config, options), nullcontext()
    from jaxinfer.plan.compile import refusals
    from jaxinfer.plan.fit import fit_config

    held = fit_config(config, _target(topology), **options)
    return held.programs, held.sizes, refusals(held)


def _pooling_programs(model: Any, config: Any, topology: str | None, options: Any) -> ModelPrograms:
    from jaxinfer.engine.pooling.load import local_pooling_programs, vectors_of
    from jaxinfer.plan.pooled import fit_pooled, model_for, opened_for

    opened = opened_for(model, config, options)
    if topology is None:
        return local_pooling_programs(opened)
    abstract = model_for(opened, target := _target(topology))
    vectors_of(opened, abstract.config)  # a plan does with less, and takes the mean
    return fit_pooled(opened, target, abstract).programs


def _target(topology: str) -> Slice:
    from jaxinfer.plan.targets import find_target

    target = find_target(topology)
    if not target.compiles:
        raise ValueError(f"topology is {topology!r}: programs of GPUs are compiled where they are; leave it out there")
    return target
