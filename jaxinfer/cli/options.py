"""Options that commands share, in groups: a command takes a whole group as one parameter (see `grouped`)."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_type_hints

import typer

from jaxinfer.cli.console import LogHandler, Progress
from jaxinfer.quantization.schemes import SCHEMES, parse_quantization
from jaxinfer.sampling.params import DEFAULT_MAX_TOKENS, SamplingParams

if TYPE_CHECKING:
    from jaxinfer.engine.options import LoadOptions as EngineOptions
    from jaxinfer.llm import LLM

MODEL, SAMPLING = "Model", "Sampling (what is not given is as the checkpoint says)"

JSON = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, and all else on stderr.")]

# Of commands that write a model in another form.
SOURCE = Annotated[str, typer.Argument(metavar="SRC", help="Folder or Hugging Face hub id.")]
REVISION = Annotated[str | None, typer.Option(metavar="R", help="Branch, tag or commit of a model on the hub.")]
WRITTEN_DTYPE = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option("--dtype", help="Of what is not quantized; auto: what the checkpoint has."),
]


@dataclass(frozen=True)
class LoadOptions:
    """Which model, and how it is held."""

    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="M",
            help="Folder or Hugging Face hub id; without it, the small model that comes with jaxinfer.",
            rich_help_panel=MODEL,
        ),
    ] = None
    config: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="A deployment's YAML file: model and options; those given here come before it.",
            rich_help_panel=MODEL,
        ),
    ] = None
    revision: Annotated[
        str | None,
        typer.Option(metavar="R", help="Branch, tag or commit of a model on the hub.", rich_help_panel=MODEL),
    ] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"] | None,
        typer.Option(
            help="Of weights and cache; auto, as without it: the checkpoint's, if it is fast here.",
            rich_help_panel=MODEL,
        ),
    ] = None
    quantization: Annotated[
        str | None,
        typer.Option(
            metavar="SCHEME",
            help=f"Of weights: {', '.join(SCHEMES)}; or by patterns of names: '*.mlp.*=int4,*=none'.",
            rich_help_panel=MODEL,
        ),
    ] = None
    max_model_len: Annotated[
        int | None,
        typer.Option(metavar="N", help="Most tokens of prompt and answer together.", rich_help_panel=MODEL),
    ] = None

    mesh: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="Devices that share the model: tensor=4; without it, all that can on TPU and GPU, one on CPU.",
            rich_help_panel=MODEL,
        ),
    ] = None

    attention: Annotated[
        Literal["auto", "xla", "pallas"] | None,
        typer.Option(
            help="What reads the cache; auto, as without it: a Pallas kernel on TPU, plain XLA elsewhere.",
            rich_help_panel=MODEL,
        ),
    ] = None

    kv_cache_dtype: Annotated[
        Literal["auto", "int8", "fp8"] | None,
        typer.Option(
            help="Of keys and values; auto, as without it: that of activations; on TPU fp8.", rich_help_panel=MODEL
        ),
    ] = None

    compiled: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Programs that jaxinfer compile has made, so that nothing compiles; as trusted as code.",
            rich_help_panel=MODEL,
        ),
    ] = None

    def loading(self, **more: Any) -> tuple[str | os.PathLike[str], EngineOptions]:
        """Model and options for LLM, these and `more` of them: what is given, before what --config says."""
        given = {name: value for name, value in (dataclasses.asdict(self) | more).items() if value is not None}
        config, model = given.pop("config", None), given.pop("model", None)
        if self.quantization is not None:
            given["quantization"] = parse_quantization(self.quantization)
        if config is not None:
            from jaxinfer.engine.deployment import read_deployment

            return read_deployment(config).loading(model, cast("EngineOptions", given))
        from jaxinfer.demo import MODEL_DIR

        return MODEL_DIR if model is None else model, cast("EngineOptions", given)

    def load(self, progress: Progress, **more: Any) -> LLM:
        """The model in memory, with `more` options of `LLM`. Raises what that raises; a wrong name shows before JAX is
        imported."""
        from jaxinfer.checkpoint.hub import resolve

        model, options = self.loading(**more)
        folder = resolve(model, options.pop("revision", None))
        progress("starting JAX")
        from jaxinfer.llm import LLM

        return LLM(folder, **options | {"on_progress": progress})


CHAT_TEMPLATE = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="A Jinja template instead of the checkpoint's, or the name of one that it has."),
]


def chat_template(named: str, llm: LLM) -> str:
    """What --chat-template stands for: one of the checkpoint's by name, or the content of a file. Raises ValueError."""
    templates = llm.tokenizer.chat_templates.templates
    if named in templates:
        return templates[named]
    try:
        return Path(named).read_text(encoding="utf-8")
    except FileNotFoundError:
        names = f"the checkpoint's are {', '.join(sorted(templates))}" if templates else "the checkpoint has none"
        raise ValueError(f"--chat-template {named}: no such file, and no such template: {names}") from None
    except UnicodeDecodeError:
        raise ValueError(f"--chat-template {named}: not UTF-8; give a Jinja template") from None


@dataclass(frozen=True)
class SamplingOptions:
    """The fields of SamplingParams that the command line has; None is not given."""

    max_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N", help=f"Most tokens of an answer; without it {DEFAULT_MAX_TOKENS}.", rich_help_panel=SAMPLING
        ),
    ] = None
    temperature: Annotated[
        float | None, typer.Option(metavar="X", help="0: always the likeliest token.", rich_help_panel=SAMPLING)
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(
            metavar="X", help="Only the likeliest tokens of this total probability.", rich_help_panel=SAMPLING
        ),
    ] = None
    top_k: Annotated[
        int | None,
        typer.Option(metavar="N", help="Only the N likeliest tokens; 0 or -1: all.", rich_help_panel=SAMPLING),
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(
            metavar="X", help="Only tokens of this share of the likeliest one's probability.", rich_help_panel=SAMPLING
        ),
    ] = None
    presence_penalty: Annotated[
        float | None,
        typer.Option(metavar="X", help="Off the logits of tokens that are in the answer.", rich_help_panel=SAMPLING),
    ] = None
    frequency_penalty: Annotated[
        float | None, typer.Option(metavar="X", help="The same, as often as they are in it.", rich_help_panel=SAMPLING)
    ] = None
    repetition_penalty: Annotated[
        float | None,
        typer.Option(metavar="X", help="Above 1: fewer tokens that are in prompt or answer.", rich_help_panel=SAMPLING),
    ] = None
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="The same seed gives the same text.", rich_help_panel=SAMPLING)
    ] = None
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="S", help="End before this string; may be repeated.", rich_help_panel=SAMPLING),
    ] = None

    @property
    def given(self) -> dict[str, Any]:
        """Those that are given."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    def params(self, defaults: SamplingParams | None = None, **more: Any) -> SamplingParams:
        """These, and `more` of them, over `defaults`. Raises ValueError for a value out of range, so call it before
        loading as well."""
        return (defaults or SamplingParams()).with_changes(**{"max_tokens": DEFAULT_MAX_TOKENS} | self.given | more)


@dataclass(frozen=True)
class Verbosity:
    """How much is said on stderr."""

    verbose: Annotated[
        int, typer.Option("--verbose", "-v", count=True, show_default=False, help="Say more; -vv: debugging.")
    ] = 0
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")] = False

    def apply(self, plain: bool = False) -> Progress:
        """Sets up logging; returns the progress line. plain: see Progress, for what takes minutes before it has
        anything to show."""
        levels = (logging.WARNING, logging.INFO, logging.DEBUG)
        log = logging.getLogger("jaxinfer")
        log.handlers = [LogHandler()]
        log.setLevel(logging.ERROR if self.quiet else levels[min(self.verbose, 2)])
        log.propagate = False
        if self.quiet:
            warnings.simplefilter("ignore")
        return Progress(self.quiet, plain)


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Lets a command have dataclasses of annotated fields as parameters: typer sees the fields as options."""
    parameters = inspect.signature(command, eval_str=True).parameters.values()
    groups: dict[str, Any] = {p.name: p.annotation for p in parameters if dataclasses.is_dataclass(p.annotation)}
    shown = [p for p in parameters if p.name not in groups]
    for group in groups.values():
        hints = get_type_hints(group, include_extras=True)
        for field in dataclasses.fields(group):
            kind = inspect.Parameter.KEYWORD_ONLY
            shown.append(inspect.Parameter(field.name, kind, default=field.default, annotation=hints[field.name]))

    @functools.wraps(command)
    def run(**given: Any) -> None:
        built = {
            name: group(**{field.name: given.pop(field.name) for field in dataclasses.fields(group)})
            for name, group in groups.items()
        }
        command(**given, **built)

    run.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in shown}
    return run
