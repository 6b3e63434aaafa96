"""A server: its socket, its signals, its end."""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import logging
import os
import resource
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from http import HTTPStatus
from types import FrameType
from typing import Any, Unpack
from weakref import WeakKeyDictionary

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from jaxinfer.demo import MODEL_DIR
from jaxinfer.engine.config import EngineConfig
from jaxinfer.llm import LLM
from jaxinfer.openai.errors import error_body
from jaxinfer.server.app import make_app
from jaxinfer.server.config import ServerConfig
from jaxinfer.server.service import Service
from jaxinfer.server.transport import CorkedTransport, Outbox

log = logging.getLogger("jaxinfer")

HEADER_BYTES = 2**16  # of a request's line and headers
HEADER_SECONDS = 30.0  # to send them in, from the connection or the last answer on
KEEP_ALIVE_SECONDS = 75  # longer than clients keep a connection that is not used
SPARE_FILES = 256  # that the process may open beside connections, half of them those that get 503
LATE_SECONDS = 1.0  # for requests that wait on their sockets after a drain to get 503; for an answer to be read
SWITCH_SECONDS = 0.0005  # the engine's thread waits so long for the event loop's to let it go on
ABORT_SECONDS = 5.0  # requests that were aborted have so long to say so


_outboxes: WeakKeyDictionary[asyncio.AbstractEventLoop, Outbox] = WeakKeyDictionary()


class Protocol(HttpToolsProtocol):
    """Bounds what may come before a request is known."""

    _header_bytes = 0
    _in_headers = True
    _refused = False
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        outbox = _outboxes.setdefault(self.loop, Outbox())
        self.transport = CorkedTransport(transport, outbox)  # type: ignore[assignment]
        most, self.limit_concurrency = self.config.limit_concurrency, None  # or uvicorn would answer, in its own form
        assert most is not None
        self.app_state = self.app_state | {"crowded": len(self.connections) > most}
        if len(self.connections) > most + SPARE_FILES // 2:  # too many to say so to each
            transport.close()
        self._deadline = self.loop.call_later(HEADER_SECONDS, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._heard()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._in_headers:
            self._header_bytes += len(data)
            if self._header_bytes > HEADER_BYTES + len(data):  # what came before this piece was headers alone
                self._refuse_headers()
                return
            if self._deadline is None:
                self._deadline = self.loop.call_later(HEADER_SECONDS, self.transport.close)
        super().data_received(data)

    def send_400_response(self, msg: str) -> None:
        self._answer(HTTPStatus.BAD_REQUEST, msg)
        self.transport.close()

    def _refuse_headers(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:  # an answer before this one is on its way
            self.transport.close()
            return
        msg = f"the request's line and headers have more than {HEADER_BYTES} bytes, the most that are read"
        self._answer(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, msg)
        self._refused = True
        self._heard()
        # Closed at once, with more on its way, the connection would be reset, and the answer lost.
        self._deadline = self.loop.call_later(LATE_SECONDS, self.transport.close)

    def _answer(self, status: HTTPStatus, msg: str) -> None:
        body = json.dumps(error_body(msg, status)).encode()
        head = f"HTTP/1.1 {status} {status.phrase}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(f"{head}connection: close\r\n\r\n".encode() + body)

    def on_message_begin(self) -> None:
        self._in_headers, self._header_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_headers = False
        self._heard()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_headers, self._header_bytes = True, 0
        super().on_message_complete()

    def _heard(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class Server(uvicorn.Server):
    """Ends when it has drained after a signal, or when the engine has failed."""

    def __init__(self, service: Service):
        config = service.config
        super().__init__(
            uvicorn.Config(
                make_app(service),
                http=Protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                limit_concurrency=room_for(config.max_connections),
                timeout_graceful_shutdown=int(ABORT_SECONDS),
                ssl_certfile=config.ssl_certfile,
                ssl_keyfile=config.ssl_keyfile,
            )
        )
        self.service = service
        self.last_signal = signal.SIGTERM
        self._ends = self._late = 0.0
        self._answered = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal lets requests end, the second ends them."""
        if self.service.state == "ready":
            log.warning("shutting down: %d requests may still end; once more to end them", self.service.active)
            self.service.drain()
        else:
            self.force_exit = self.should_exit = True
            self.last_signal = signal.Signals(sig)

    async def on_tick(self, counter: int) -> bool:
        service, now = self.service, time.monotonic()
        answered, self._answered = self._answered, self.server_state.total_requests
        if service.state == "draining":
            self._ends = self._ends or now + service.config.drain_seconds
            if service.active or not self._late:
                self._late = now + LATE_SECONDS
            done = not service.active and (self._answered == answered or now > self._late)
            if done or now > self._ends:
                self.should_exit = True
        elif service.state == "failed":
            self.should_exit = True
        if self.should_exit:
            service.abort_all()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self.service.config.uds is not None:
            with suppress(OSError):
                os.unlink(self.service.config.uds)


def room_for(connections: int) -> int:
    """So many, or as many as this process may have open files for; its own limit is raised to the system's for it."""
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + SPARE_FILES
    if limit == resource.RLIM_INFINITY or limit >= wanted:
        return connections
    limit = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))
    if limit < wanted:
        log.warning("at most %d connections: ulimit -n is %d", max(1, limit - SPARE_FILES), limit)
    return max(1, min(connections, limit - SPARE_FILES))


def open_socket(config: ServerConfig) -> socket.socket:
    """Bound, not yet listening: what is wrong with a port shows before a model is loaded. Raises ValueError."""
    if config.uds is not None:
        bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mask = os.umask(0o177)
        try:
            if _is_left_over(config.uds):
                os.unlink(config.uds)
            bound.bind(config.uds)
        except OSError as error:
            bound.close()
            raise ValueError(f"uds is {config.uds}: {error.strerror}; remove it, or choose another one") from None
        finally:
            os.umask(mask)
        return bound
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((config.host, config.port))
    except OSError as error:
        bound.close()
        raise ValueError(f"{config.host}:{config.port}: {error.strerror}; choose another --host or --port") from None
    return bound


def _is_left_over(path: str) -> bool:
    """Whether it is the socket of a server that was killed: one that nobody listens at."""
    if not os.path.exists(path) or not stat.S_ISSOCK(os.stat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(1)
        return client.connect_ex(path) == errno.ECONNREFUSED


def url_of(config: ServerConfig, bound: socket.socket) -> str:
    """Where it is."""
    if config.uds is not None:
        return f"unix:{config.uds}"
    host, port = bound.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return f"{'https' if config.ssl_certfile else 'http'}://{shown}:{port}"


def run(llm: LLM, config: ServerConfig, bound: socket.socket) -> BaseException | None:
    """Serves until a signal comes. Returns what the engine failed with, if it has. Raises KeyboardInterrupt,
    with the signal, after a second one, so that nobody waits for the device."""
    _tune_process()
    service = Service(llm, config)
    server = Server(service)
    with closing(service):
        server.run(sockets=[bound])
    if server.force_exit:
        raise KeyboardInterrupt(server.last_signal)
    return service.failure


def _tune_process() -> None:
    """Of a process that only serves, when its model is loaded."""
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.collect()
    gc.freeze()  # what is there stays: the collector need not look at it again and again


class Background:
    """A server in a thread of this program.

        with jaxinfer.serve("org/model") as server:
            client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")

    url: where it is. `close()` lets requests that run end, for `drain_seconds`, and frees the model, if it was loaded
    for this.
    """

    def __init__(self, llm: LLM, config: ServerConfig, owns: bool, bound: socket.socket | None = None):
        self.llm, self._owns = llm, owns
        self._socket = open_socket(config) if bound is None else bound
        self.url = url_of(config, self._socket)
        try:
            self._service = Service(llm, config)
        except BaseException:
            self._socket.close()
            raise
        self._server = Server(self._service)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, name="jaxinfer-server", daemon=True
        )
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            time.sleep(0.005)

    def close(self) -> None:
        self._service.drain()
        self._thread.join()
        self._service.close()
        if self._owns:
            self.llm.close()

    def __enter__(self) -> Background:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<jaxinfer server {self.url}>"


def serve(
    model: str | os.PathLike[str] | LLM | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    served_model_name: str | Sequence[str] = (),
    api_key: str | Sequence[str] = (),
    max_queued: int = 1024,
    drain_seconds: float = 30.0,
    adapter_dir: str | None = None,
    **options: Unpack[EngineConfig],
) -> Background:
    """A server of a model in the background, at `.url` until `.close()`.

    model: a folder or hub id, the small model that comes with jaxinfer, or one that is loaded, which stays so. options:
    those of LLM. The others: see `jaxinfer.server.config.ServerConfig`. Raises ValueError and what LLM raises.
    """
    source = MODEL_DIR if model is None else model
    name = source.folder if isinstance(source, LLM) else source
    config = ServerConfig(
        host=host,
        port=port,
        names=names_of(name, [served_model_name] if isinstance(served_model_name, str) else served_model_name),
        api_keys=(api_key,) if isinstance(api_key, str) else tuple(api_key),
        max_queued=max_queued,
        drain_seconds=drain_seconds,
        adapter_dir=adapter_dir,
    )
    if isinstance(source, LLM):
        if options:
            raise ValueError(f"{', '.join(options)}: the model is loaded already; give them to LLM")
        return Background(source, config, owns=False)
    bound = open_socket(config)
    try:
        return Background(LLM(source, **options), config, owns=True, bound=bound)
    except BaseException:
        bound.close()
        raise


def names_of(model: str | os.PathLike[str], given: Sequence[str]) -> tuple[str, ...]:
    """What a model is called in requests: of a folder its name, not where it is."""
    if given:
        return tuple(given)
    if model == MODEL_DIR:
        return ("jaxinfer-demo",)
    path = os.fspath(model)
    return (os.path.basename(os.path.normpath(path)) if os.path.exists(path) else path,)
