"""What can be said of how a model is served, checked before anything is loaded."""

from __future__ import annotations

import hashlib
import ipaddress
import os
from dataclasses import dataclass

from jaxinfer.text.formats import REASONING, TOOLS

AUTO, NONE = "auto", "none"


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """How a model is served. Raises ValueError.

    host, port: where; port 0 is any that is free. uds: a Unix socket in place of them, which only its owner can use.
    names: of the model in requests; the first is in answers.
    api_keys: one of them must come with each request, but for those that ask whether the server is there.
    no_api_key: nobody needs one, wherever the server can be reached from.
    public_metrics: /metrics and /load need no key.
    allowed_hosts: names that requests may give in Host besides localhost, `host` and addresses.
    max_queued: most requests that may wait; one more is answered 429.
    max_sequences: most continuations of one request, of all its prompts.
    max_body_bytes: of a request. max_messages: of a conversation.
    max_connections: at a time; more are answered 503.
    request_seconds: a request that takes longer ends with finish_reason "abort".
    drain_seconds: after SIGTERM requests that run have so long.
    tool_call_parser, reasoning_parser: see `jaxinfer.text.formats`; "auto": as the chat template shows; or "none".
    trust_request_chat_template: requests may bring a chat template of their own.
    adapter_dir: a folder; requests may load the adapters in folders below it, and unload any. None: they may not.
    ssl_certfile, ssl_keyfile: of TLS.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    names: tuple[str, ...] = ("jaxinfer",)
    api_keys: tuple[str, ...] = ()
    no_api_key: bool = False
    public_metrics: bool = False
    allowed_hosts: tuple[str, ...] = ()
    max_queued: int = 1024
    max_sequences: int = 128
    max_body_bytes: int = 2**24
    max_messages: int = 4096
    max_connections: int = 16384
    request_seconds: float = 3600.0
    drain_seconds: float = 30.0
    tool_call_parser: str = AUTO
    reasoning_parser: str = AUTO
    trust_request_chat_template: bool = False
    adapter_dir: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_queued", "max_sequences", "max_body_bytes", "max_messages", "max_connections"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("request_seconds", "drain_seconds"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 0")
        for name, known in (("tool_call_parser", TOOLS), ("reasoning_parser", REASONING)):
            if getattr(self, name) not in (AUTO, NONE, *known):
                raise ValueError(f"{name} is {getattr(self, name)!r}: it must be one of auto, none, {', '.join(known)}")
        if not self.names or not all(self.names):
            raise ValueError("served_model_name is empty: give a name, or none for the model's own")
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port is {self.port}: it must be from 0 to 65535")
        if any(not key.isascii() or len(key) < 8 or key != key.strip() for key in self.api_keys):
            raise ValueError("an API key must have at least 8 characters, all of them ASCII, and no spaces around it")
        if not (self.api_keys or self.no_api_key or self.uds is not None or is_loopback(self.host)):
            raise ValueError(
                f"host is {self.host!r}, which others can reach, and there is no API key: give --api-key-file, or "
                "JAXINFER_API_KEY, or --no-api-key for a server that is open to all who reach it"
            )
        if self.adapter_dir is not None and not os.path.isdir(self.adapter_dir):
            raise ValueError(f"adapter_dir is {self.adapter_dir!r}: there is no such folder")
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ValueError("ssl_certfile and ssl_keyfile go together: give both")

    @property
    def digests(self) -> tuple[bytes, ...]:
        """Of the keys: all of one length, so that comparing takes one time."""
        return tuple(hashlib.sha256(key.encode()).digest() for key in self.api_keys)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
