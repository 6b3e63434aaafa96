"""`jaxinfer serve`."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxinfer.cli.bench import BatchingOptions
from jaxinfer.cli.hosts import HostOptions
from jaxinfer.cli.options import ADAPTERS, AdapterOptions, ModelOptions, Verbosity, grouped

WHERE, WHO, LIMITS, CHAT, TRACES = "Where", "Who may ask", "Limits", "Chat", "Traces"
KEY = "JAXINFER_API_KEY"


@dataclass(frozen=True)
class ServerOptions:
    """Those of ServerConfig."""

    host: Annotated[
        str, typer.Option(metavar="H", help="Address that it listens at; others need a key.", rich_help_panel=WHERE)
    ] = "127.0.0.1"
    port: Annotated[int, typer.Option(metavar="N", help="0: any that is free.", rich_help_panel=WHERE)] = 8000
    uds: Annotated[
        str | None, typer.Option(metavar="FILE", help="A Unix socket in place of them.", rich_help_panel=WHERE)
    ] = None
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Of the model in requests; may be repeated.", rich_help_panel=WHERE),
    ] = None
    ssl_certfile: Annotated[str | None, typer.Option(metavar="FILE", help="Of TLS.", rich_help_panel=WHERE)] = None
    ssl_keyfile: Annotated[str | None, typer.Option(metavar="FILE", help="Of TLS.", rich_help_panel=WHERE)] = None
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            help=f"One of these must come with a request; ps shows it, ${KEY} and --api-key-file don't.",
            rich_help_panel=WHO,
        ),
    ] = None
    api_key_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="With a key on each line.", rich_help_panel=WHO)
    ] = None
    no_api_key: Annotated[
        bool, typer.Option("--no-api-key", help="Open to all who reach --host.", rich_help_panel=WHO)
    ] = False
    public_metrics: Annotated[
        bool, typer.Option("--public-metrics", help="/metrics and /load need no key.", rich_help_panel=WHO)
    ] = False
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="A name that clients reach it by, where there is no key.", rich_help_panel=WHO
        ),
    ] = None
    max_queued: Annotated[
        int, typer.Option(metavar="N", help="Requests that may wait; more get 429.", rich_help_panel=LIMITS)
    ] = 1024
    max_sequences: Annotated[
        int, typer.Option(metavar="N", help="Continuations of one request.", rich_help_panel=LIMITS)
    ] = 128
    max_body_bytes: Annotated[int, typer.Option(metavar="N", help="Of a request.", rich_help_panel=LIMITS)] = 2**24
    request_seconds: Annotated[
        float, typer.Option(metavar="X", help="A request that takes longer is cut off.", rich_help_panel=LIMITS)
    ] = 3600.0
    drain_seconds: Annotated[
        float, typer.Option(metavar="X", help="For requests to end in after SIGTERM.", rich_help_panel=LIMITS)
    ] = 30.0
    no_warmup: Annotated[
        bool,
        typer.Option("--no-warmup", help="Programs are compiled when they are first needed.", rich_help_panel=LIMITS),
    ] = False
    adapter_dir: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Requests may load adapters in folders below, and unload any.", rich_help_panel=ADAPTERS
        ),
    ] = None
    tool_call_parser: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="How the model writes calls of tools: auto, none, hermes, ...", rich_help_panel=CHAT
        ),
    ] = "auto"
    reasoning_parser: Annotated[
        str,
        typer.Option(metavar="NAME", help="How it writes reasoning: auto, none, think, ...", rich_help_panel=CHAT),
    ] = "auto"
    trust_request_chat_template: Annotated[
        bool,
        typer.Option("--trust-request-chat-template", help="Requests may bring a chat template.", rich_help_panel=CHAT),
    ] = False
    otlp_traces_endpoint: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Of a collector: OpenTelemetry's spans of requests.", rich_help_panel=TRACES),
    ] = None

    def config(self, names: tuple[str, ...]) -> Any:
        """A ServerConfig. Raises ValueError and OSError."""
        from jaxinfer.server.config import ServerConfig

        given = dataclasses.asdict(self)
        for name in ("served_model_name", "api_key", "api_key_file", "allowed_host", "no_warmup"):
            del given[name]
        return ServerConfig(**given, names=names, api_keys=self._keys(), allowed_hosts=tuple(self.allowed_host or ()))

    def _keys(self) -> tuple[str, ...]:
        keys = list(self.api_key or ())
        if self.api_key_file is not None:
            lines = Path(self.api_key_file).read_text(encoding="utf-8").splitlines()
            keys += [line.strip() for line in lines if line.strip()]
            if not keys:
                raise ValueError(f"--api-key-file {self.api_key_file}: there is no key in it; write one a line")
        if os.environ.get(KEY):
            keys.append(os.environ[KEY].strip())
        return tuple(keys)


@grouped
def serve(
    served: Annotated[str | None, typer.Argument(metavar="M", show_default=False, help="As --model.")] = None,
    *,
    server: ServerOptions,
    batching: BatchingOptions,
    load: ModelOptions,
    adapters: AdapterOptions,
    hosts: HostOptions,
    verbosity: Verbosity,
) -> None:
    """Serve a model over HTTP, to clients that speak OpenAI.

    SIGTERM and Ctrl-C let requests end that run, for --drain-seconds; a second one ends them.
    """
    if served is not None:
        if load.model is not None:
            raise ValueError(f"the model is given twice, as {served} and by --model: leave one out")
        load = dataclasses.replace(load, model=served)
    with verbosity.apply(plain=True) as progress:
        try:
            import uvicorn  # noqa: F401
        except ImportError:
            raise ValueError("a server needs starlette, uvicorn and httptools: pip install '.[server]'") from None
        options = {"runner": "auto", "warmup": not server.no_warmup, **adapters.loading}
        if hosts.join():
            batching.load(load, progress, **options)
        from contextlib import closing

        from jaxinfer.server.run import names_of, open_socket, run, url_of

        name, _ = load.loading()
        config = server.config(names_of(name, server.served_model_name or ()))
        if config.adapter_dir is not None and load.config is None and not adapters.loading:
            raise ValueError("--adapter-dir is given, and there is no room for adapters: give --max-adapters, too")
        with closing(open_socket(config)) as bound:
            llm = batching.load(load, progress, **options)
            progress.hide()
            bound.listen(2048)  # who reads the next line may come at once
            if not verbosity.quiet:
                logging.getLogger("jaxinfer").setLevel(logging.INFO)
                print(f"serving {config.names[0]} at {url_of(config, bound)}", file=sys.stderr, flush=True)
            try:
                failure = run(llm, config, bound)
            except KeyboardInterrupt as end:
                if signal.SIGTERM in end.args:
                    raise typer.Exit(128 + signal.SIGTERM) from None
                raise
    if failure is not None:
        raise SystemExit(f"jaxinfer: error: the engine has failed: {' '.join(str(failure).split())}")
    llm.close()
