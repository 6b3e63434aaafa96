"""Options that commands share, in groups: a command takes a whole group as one parameter (see `grouped`)."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_type_hints

import typer

from jaxinfer.aliases.loading import VALUES, spelt
from jaxinfer.cli.console import LogHandler, Progress
from jaxinfer.engine.config import OPTIONS, DType, EngineConfig, check_options
from jaxinfer.quantization.schemes import parse_quantization
from jaxinfer.sampling.params import DEFAULT_MAX_TOKENS, SamplingParams

if TYPE_CHECKING:
    from jaxinfer.llm import LLM

MODEL, ADAPTERS, SAMPLING = "Model", "Adapters", "Sampling (what is not given is as the checkpoint says)"


def engine_option(name: str, panel: str | None = None) -> Any:
    """What the command line says of an option of EngineConfig."""
    option = OPTIONS[name].option
    return typer.Option(metavar=option.metavar, help=option.help, rich_help_panel=panel)


JSON = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, and all else on stderr.")]

# Of commands that write a model in another form.
SOURCE = Annotated[str, typer.Argument(metavar="SRC", help="Folder or Hugging Face hub id.")]
REVISION = Annotated[str | None, engine_option("revision")]
WRITTEN_DTYPE = Annotated[DType, typer.Option(help="Of what is not quantized; auto: what the checkpoint has.")]

BASE_QUANTIZATION = Annotated[
    str | None,
    typer.Option(
        metavar="SCHEME",
        help="By which the adapter's base was quantized when it was trained (QLoRA: nf4), if it is in floats here.",
    ),
]


class EngineOptions:
    """Marks a field of a group that holds these options of EngineConfig, as far as they are given."""

    def __init__(self, panel: str, *names: str):
        self.annotations = {name: Annotated[self._kind(name) | None, engine_option(name, panel)] for name in names}

    @staticmethod
    def _kind(name: str) -> Any:
        """What the command line makes of it."""
        option = OPTIONS[name]
        if option.choices:
            return Literal[(*option.choices, *VALUES.get(name, ()))]  # as LLM takes them
        return next((kind for kind in (int, float) if kind in option.kinds), str)


@dataclass(frozen=True)
class ModelOptions:
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
    options: Annotated[
        EngineConfig,
        EngineOptions(
            MODEL,
            "revision",
            "tokenizer",
            "dtype",
            "quantization",
            "max_model_len",
            "mesh",
            "attention",
            "kv_cache_dtype",
            "compiled",
        ),
    ] = dataclasses.field(default_factory=EngineConfig)

    def loading(self, **more: Any) -> tuple[str | os.PathLike[str], EngineConfig]:
        """Model and options for LLM, these and `more` of them: what is given, before what --config says. Raises
        ValueError for what can't be given."""
        given = {**self.options, **more}
        settings = {name: spelt(name, value) for name, value in given.items() if value is not None}
        if "quantization" in settings:
            settings["quantization"] = parse_quantization(settings["quantization"])
        check_options(settings)
        options = cast(EngineConfig, settings)
        if self.config is not None:
            from jaxinfer.engine.deployment import read_deployment

            return read_deployment(self.config).loading(self.model, options)
        from jaxinfer.demo import MODEL_DIR

        return MODEL_DIR if self.model is None else self.model, options

    def load(self, progress: Progress, **more: Any) -> LLM:
        """A model that makes text in memory, with `more` options of `LLM`. Raises what that raises; a wrong name shows
        before JAX is imported."""
        from jaxinfer.checkpoint.hub import resolve

        model, options = self.loading(**{"runner": "generate"} | more)
        folder = resolve(model, options.pop("revision", None))
        progress("starting JAX")
        from jaxinfer.llm import LLM

        return LLM(folder, **options | {"on_progress": progress})


@dataclass(frozen=True)
class AdapterOptions:
    """Low-rank adapters beside the weights."""

    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=DIR",
            help="One in PEFT's format, a folder or hub id, and how it is called; may be repeated.",
            rich_help_panel=ADAPTERS,
        ),
    ] = None
    options: Annotated[EngineConfig, EngineOptions(ADAPTERS, "max_adapters", "max_lora_rank", "max_host_adapters")] = (
        dataclasses.field(default_factory=EngineConfig)
    )

    @property
    def folders(self) -> dict[str, str]:
        """By name. Raises ValueError."""
        folders: dict[str, str] = {}
        for given in self.adapter or ():
            name, _, folder = given.partition("=")
            if not name or not folder:
                raise ValueError(f"--adapter is {given!r}: it must be NAME=DIR, such as sql=adapters/sql")
            if name in folders:
                raise ValueError(f"--adapter: there are two called {name}: give them two names")
            folders[name] = folder
        return folders

    @property
    def loading(self) -> dict[str, Any]:
        """Options of LLM. Raises ValueError."""
        return {**self.options, **({"adapters": self.folders} if self.adapter else {})}


@dataclass(frozen=True)
class PromptAdapterOptions(AdapterOptions):
    """The same, and which one prompts have."""

    use: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The adapter that prompts have; without it, the only --adapter.",
            rich_help_panel=ADAPTERS,
        ),
    ] = None

    @property
    def of_rows(self) -> str | None:
        """That of rows which say nothing of it, where each row may name one. Raises ValueError."""
        return None if self.use is None and len(self.folders) > 1 else self.used

    @property
    def used(self) -> str | None:
        """The adapter of prompts. Raises ValueError where it is not clear which."""
        names = list(self.folders)
        if self.use is None and len(names) > 1:
            raise ValueError(f"--adapter: there are {', '.join(names)}; --use NAME says which one prompts have")
        if self.use is not None and names and self.use not in names:
            raise ValueError(f"--use is {self.use!r}, and --adapter names {', '.join(names)}")
        return self.use or next(iter(names), None)


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
    def changes(self) -> dict[str, Any]:
        """Those that are given."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    def params(self, defaults: SamplingParams | None = None, **more: Any) -> SamplingParams:
        """These, and `more` of them, over `defaults`. Raises ValueError for a value out of range, so call it before
        loading as well."""
        return (defaults or SamplingParams()).with_changes(**{"max_tokens": DEFAULT_MAX_TOKENS} | self.changes | more)


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
        for field, hint in _fields(group):
            options = hint.annotations if isinstance(hint, EngineOptions) else {field.name: hint}
            default = None if isinstance(hint, EngineOptions) else field.default
            kind = inspect.Parameter.KEYWORD_ONLY
            shown += [inspect.Parameter(n, kind, default=default, annotation=hint) for n, hint in options.items()]

    @functools.wraps(command)
    def run(**kwargs: Any) -> None:
        built = {
            name: group(**{field.name: _value(field.name, hint, kwargs) for field, hint in _fields(group)})
            for name, group in groups.items()
        }
        command(**kwargs, **built)

    run.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in shown}
    return run


def _fields(group: Any) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
    """Each, with its annotation, or the options of EngineConfig that it stands for."""
    hints = get_type_hints(group, include_extras=True)
    for field in dataclasses.fields(group):
        (annotation,) = hints[field.name].__metadata__
        yield field, annotation if isinstance(annotation, EngineOptions) else hints[field.name]


def _value(name: str, hint: Any, kwargs: dict[str, Any]) -> Any:
    """Of a field, out of what is given."""
    if not isinstance(hint, EngineOptions):
        return kwargs.pop(name)
    return {n: value for n in hint.annotations if (value := kwargs.pop(n)) is not None}
