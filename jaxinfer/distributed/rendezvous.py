"""How the processes of several hosts find each other: all connect to process 0, which checks that they belong together.

Only then is JAX started, which ends its process from C++ where somebody is missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import ipaddress
import logging
import os
import secrets
import selectors
import socket
import time
from collections.abc import Iterator, Sequence
from enum import IntEnum
from glob import glob
from importlib.metadata import version
from typing import Any, NamedTuple

from jaxinfer import __version__
from jaxinfer.distributed.links import Link, decode, encode

log = logging.getLogger("jaxinfer")

SECRET = "JAXINFER_SECRET"
HANDSHAKE = 5.0  # seconds for all of one
CALLERS = 256  # that may be at it at once
WORKERS = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/worker-network-endpoints"
MOST = 1 << 16  # bytes of a frame of one


class Kind(IntEnum):
    """Of a frame. Joining: HELLO, READY and REFUSED come from process 0, JOIN from the others. Later: see Group."""

    HELLO, JOIN, READY, REFUSED, PING, VALUE, VALUES, COMMAND, FAILED, END = range(1, 11)


class Place(NamedTuple):
    """The processes that belong together, and which one this is.

    host, port: where process 0 is reached.
    size: how many processes there are.
    rank: which one this is, from 0.
    local_device_ids: which devices of its host are its; None: all.
    """

    host: str
    port: int
    size: int
    rank: int
    local_device_ids: Sequence[int] | None = None

    @property
    def coordinator(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def local(self) -> bool:
        """Whether all processes are on this machine: then nobody else can connect."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def find_place(
    coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: float
) -> Place | None:
    """What is given, and for the rest what JAX finds: on TPU pods, Slurm, Open MPI. None: one process alone.

    Raises ValueError.
    """
    devices: Sequence[int] | None = None
    if None in (coordinator, num_processes, process_id):
        from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize asks

        arguments = coordinator, num_processes, process_id
        coordinator, num_processes, process_id, devices = ClusterEnv.auto_detect_unset_distributed_params(
            *arguments, None, None, int(timeout)
        )
        if arguments == (None, None, None) and (coordinator is None or num_processes == 1):
            return None
    for name, value in (("coordinator", coordinator), ("num_processes", num_processes), ("process_id", process_id)):
        if value is None:
            raise ValueError(f"{name} is missing: give coordinator, num_processes and process_id, or on a TPU pod none")
    assert coordinator is not None
    host, _, port = coordinator.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"coordinator is {coordinator!r}: it must be HOST:PORT of process 0, such as 10.0.0.2:8476")
    size, rank = _integer("num_processes", num_processes, 1, 2**16), _integer("process_id", process_id, 0, 2**16)
    if rank >= size:
        raise ValueError(f"process_id is {rank}: with num_processes {size} it must be from 0 to {size - 1}")
    return Place(host, int(port), size, rank, devices) if size > 1 else None


def on_tpu_pod() -> bool:
    """Whether this is one host of several that a TPU slice has, as GKE's environment variables say, or, where there are
    chips, Google Cloud's metadata server."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms.split(","):
        return False
    if any("," in os.environ.get(name, "") for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")):
        return True
    if os.environ.get("TPU_SKIP_MDS_QUERY") or not [*glob("/dev/accel[0-9]*"), *glob("/dev/vfio/[0-9]*")]:
        return False
    import urllib.request

    asked = urllib.request.Request(WORKERS, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(asked, timeout=2) as answer:
            return b"," in answer.read(1 << 16)
    except OSError:
        return False


def _integer(name: str, value: Any, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}: it must be an integer from {low} to {high}")
    return value


def join(cluster: Place, timeout: float) -> tuple[dict[int, Link], int]:
    """Links to the other processes (those of process 0 to all, the others' to it), and the port of JAX's coordinator.

    Raises TimeoutError if they are not all there after `timeout` seconds, and ValueError, in each of them, if they
    don't belong together.
    """
    if cluster.rank == 0:
        return _welcome_all(cluster, timeout)
    link, port = _join(cluster, timeout)
    return {0: link}, port


def _welcome_all(cluster: Place, timeout: float) -> tuple[dict[int, Link], int]:
    deadline = time.monotonic() + timeout
    links: dict[int, Link] = {}
    proofs: dict[int, str] = {}
    with _listen(cluster) as server, contextlib.closing(_Callers(server)) as callers:
        try:
            while len(links) < cluster.size - 1:
                if time.monotonic() > deadline:
                    missing = ", ".join(str(i) for i in range(1, cluster.size) if i not in links)
                    raise TimeoutError(
                        f"process {missing} of {cluster.size} did not connect to {cluster.coordinator} within "
                        f"{timeout:g} s: start the same program on every host, each with a process_id of its own"
                    )
                for caller, message in callers.listen(deadline):
                    with contextlib.suppress(_Stranger):
                        rank, proof = _welcome(caller, message, cluster, links)
                        links[rank], proofs[rank] = caller.link, proof
        except BaseException as error:
            for link in links.values():
                _refuse(link, str(error))
            raise
    with socket.create_server(("", 0)) as free:
        port: int = free.getsockname()[1]
    for rank, link in links.items():
        link.send(Kind.READY, encode({"proof": proofs[rank], "port": port}))
    return links, port


class _Stranger(Exception):
    """Somebody who does not belong here connected."""


class _Caller(NamedTuple):
    """Somebody who has connected, what it has to answer to, and until when (of time.monotonic)."""

    link: Link
    nonce: str
    deadline: float


class _Callers:
    """Those who have connected and not said yet who they are. Each has its own time, and none waits for another."""

    def __init__(self, server: socket.socket):
        server.setblocking(False)
        self._server = server
        self._selector = selectors.DefaultSelector()
        self._selector.register(server, selectors.EVENT_READ)
        self._waiting: dict[socket.socket, _Caller] = {}  # the oldest is first

    def listen(self, deadline: float) -> Iterator[tuple[_Caller, dict[str, Any]]]:
        """Waits for somebody to call or to speak, but not beyond `deadline`; those who have spoken, with what they said
        to JOIN."""
        first = min([deadline, *(caller.deadline for caller in self._waiting.values())])
        for key, _ in self._selector.select(max(first - time.monotonic(), 0)):
            if key.fileobj is self._server:
                self._accept()
            elif (caller := self._waiting.get(key.fileobj)) is not None:  # type: ignore[call-overload]
                try:
                    frames = caller.link.read(MOST)
                    message = _content(frames[0], Kind.JOIN) if frames else None
                except (OSError, ValueError) as error:
                    self._send_away(caller, error)
                else:
                    if message is not None:
                        self._forget(caller)
                        yield caller, message
        now = time.monotonic()
        for caller in [caller for caller in self._waiting.values() if caller.deadline <= now]:
            self._send_away(caller, f"it did not say who it is within {HANDSHAKE:g} s")

    def close(self) -> None:
        """And all who wait."""
        for caller in self._waiting.values():
            caller.link.close()
        self._selector.close()

    def _accept(self) -> None:
        try:
            connection, _ = self._server.accept()
        except OSError:  # it is gone again, or there are too many
            connection = None
        if self._waiting and (connection is None or len(self._waiting) >= CALLERS):
            self._send_away(next(iter(self._waiting.values())), "there are too many others")
        if connection is None:
            return
        try:
            caller = _Caller(Link(connection, HANDSHAKE), secrets.token_hex(16), time.monotonic() + HANDSHAKE)
            caller.link.send(Kind.HELLO, encode({"nonce": caller.nonce}))
        except OSError:
            connection.close()
            return
        self._waiting[connection] = caller
        self._selector.register(connection, selectors.EVENT_READ)

    def _forget(self, caller: _Caller) -> None:
        del self._waiting[caller.link.socket]
        self._selector.unregister(caller.link.socket)

    def _send_away(self, caller: _Caller, why: object) -> None:
        self._forget(caller)
        caller.link.close()
        log.warning("a connection that was no process of this program was closed: %s", why)


def _welcome(caller: _Caller, message: dict[str, Any], cluster: Place, links: dict[int, Link]) -> tuple[int, str]:
    """Which process that is, and how it will know that process 0 has the same secret."""
    link = caller.link
    try:
        rank, facts, nonce = message["process_id"], dict(message["facts"]), str(message["nonce"])
        proven = hmac.compare_digest(str(message["proof"]), _proof("joins", caller.nonce, nonce))
    except (ValueError, KeyError, TypeError) as error:
        link.close()
        log.warning("a connection that was no process of this program was closed: %r", error)
        raise _Stranger from None
    if not proven:
        _refuse(link, f"{SECRET} is not that of process 0: set the same on every host")
        log.warning("a process at %s, which has another %s, was refused", link.address, SECRET)
        raise _Stranger
    problems = [
        f"{name} is {_line(facts.get(name))} in process {_line(rank)}, at {link.address}, and {value} in process 0"
        for name, value in _facts(cluster).items()
        if facts.get(name) != value
    ]
    if not problems and (type(rank) is not int or not 0 < rank < cluster.size or rank in links):
        problems = [f"process_id {_line(rank)} is that of two processes, one of them at {link.address}"]
    if problems:
        problem = f"{problems[0]}: start the same program on every host, each with a process_id of its own"
        _refuse(link, problem)
        raise ValueError(problem)
    return rank, _proof("leads", nonce, caller.nonce)


def _refuse(link: Link, why: str) -> None:
    with contextlib.suppress(OSError):
        link.send(Kind.REFUSED, why.encode())
    link.close()


def _join(cluster: Place, timeout: float) -> tuple[Link, int]:
    deadline = time.monotonic() + timeout
    while True:
        try:
            link, nonce = _reach(cluster)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"coordinator {cluster.coordinator} was not reached within {timeout:g} s ({error}): is process 0 "
                    "running, and is this its address?"
                ) from None
            time.sleep(0.2)
        except (ValueError, KeyError):
            raise _impostor(cluster) from None
    try:
        own = secrets.token_hex(16)
        message = {
            "process_id": cluster.rank,
            "facts": _facts(cluster),
            "nonce": own,
            "proof": _proof("joins", nonce, own),
        }
        link.send(Kind.JOIN, encode(message))
        # The others may come later.
        ready = _one(link, Kind.READY, max(deadline, time.monotonic()) + HANDSHAKE)
        if not hmac.compare_digest(str(ready["proof"]).encode(), _proof("leads", own, nonce).encode()):
            raise ValueError(f"{SECRET} is not that of process 0, at {cluster.coordinator}: set the same on every host")
        return link, int(ready["port"])
    except OSError as error:
        link.close()
        raise TimeoutError(f"process 0, at {cluster.coordinator}, did not go on: {error}") from None
    except (KeyError, TypeError):
        link.close()
        raise _impostor(cluster) from None
    except ValueError:
        link.close()
        raise


def _impostor(cluster: Place) -> ValueError:
    return ValueError(f"coordinator {cluster.coordinator}: what answers there is not process 0")


def _reach(cluster: Place) -> tuple[Link, str]:
    """A link to process 0, and the nonce that it gives."""
    deadline = time.monotonic() + HANDSHAKE
    connection = socket.create_connection((cluster.host, cluster.port), timeout=HANDSHAKE)
    try:
        if connection.getsockname() == connection.getpeername():  # TCP can do that, on one machine
            raise ConnectionRefusedError("nobody listens there")
        link = Link(connection, HANDSHAKE)
        return link, str(_one(link, Kind.HELLO, deadline)["nonce"])
    except Exception:
        connection.close()
        raise


def _one(link: Link, kind: Kind, deadline: float) -> dict[str, Any]:
    """The next frame, which has to be of this kind. Raises OSError, and ValueError, also if the other end refuses."""
    return _content(link.read_one(MOST, deadline), kind)


def _content(frame: tuple[int, bytes], kind: Kind) -> dict[str, Any]:
    got, payload = frame
    if got == Kind.REFUSED and kind == Kind.READY:
        raise ValueError(_line(payload.decode(errors="replace")))
    value = decode(payload) if got == kind else None
    if not isinstance(value, dict):
        raise ValueError(f"a frame of kind {got} instead of {kind.name}")
    return value


def _line(value: object) -> str:
    """What another process says, as it may be printed."""
    return " ".join(str(value).split())[:300]


def _facts(cluster: Place) -> dict[str, Any]:
    """What has to be the same in all processes."""
    versions = {"jaxinfer": __version__, "jax": version("jax"), "jaxlib": version("jaxlib")}
    return {"num_processes": cluster.size, **{f"the version of {name}": value for name, value in versions.items()}}


def _proof(what: str, *nonces: str) -> str:
    """That one knows the secret, which does not go over the network."""
    return hmac.new(os.environ.get(SECRET, "").encode(), "/".join((what, *nonces)).encode(), hashlib.sha256).hexdigest()


def _listen(cluster: Place) -> socket.socket:
    try:
        if cluster.local:
            family = socket.AF_INET6 if ":" in cluster.host else socket.AF_INET
            return socket.create_server((cluster.host, cluster.port), family=family)
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", cluster.port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", cluster.port))
    except OSError as error:
        raise OSError(
            f"coordinator {cluster.coordinator}: process 0 can't listen on that port ({error.strerror}); choose another"
        ) from None
