"""`jaxinfer doctor`."""

from __future__ import annotations

import json

from jaxinfer.cli.options import JSON, ModelOptions, Verbosity, grouped


@grouped
def doctor(as_json: JSON = False, *, load: ModelOptions, verbosity: Verbosity) -> None:
    """Say what is here: devices, kernels and why they are used or not, versions, the compilation cache, memory.

    With --model FOLDER or --config FILE also what that model would have here, with the options that are given: which
    attention, and why, how many bits, how much context. Exit code 2 where JAX has no device to run on.
    """
    from jaxinfer.doctor import examine, examine_model, examine_pooling

    verbosity.apply()
    config = None
    if load != ModelOptions():
        from jaxinfer.cli.plan import architecture, named

        load, deployment = named(None, load)
        model, options = load.loading()
        config = architecture(model, deployment)
    facts = examine()
    here = isinstance(facts["devices"], list)
    if here and config is not None:
        from jaxinfer.models.tasks import GENERATE, wanted_task
        from jaxinfer.plan.pooled import opened_for

        generates = wanted_task(config) == GENERATE
        facts |= examine_model(config, options) if generates else examine_pooling(opened_for(model, config, options))
    _print(facts, as_json)
    if not here:
        raise ValueError(str(facts["devices"]))


def _print(facts: dict[str, str | list[str]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in facts.items():
        table.add_row(name, "\n".join(value) if isinstance(value, list) else str(value))
    Console().print(table, markup=False, highlight=False)
