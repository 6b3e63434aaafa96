"""Renders chat templates, in a process of its own that may be killed: `jaxinfer.text.renderer` runs this file.

A template is a program of whoever published the checkpoint. Jinja's immutable sandbox keeps it from everything but its
values; how long it runs and how much it takes is for the operating system to bound, as a single operator can take
hours (`7 ** 7 ** 9`) without ever coming back to Python.

The environment is the one that templates on the Hugging Face hub are written for: block trimming, loop controls,
`raise_exception`, `strftime_now`, a `tojson` without HTML escapes, and the `{% generation %}` block.

A request is HEADER and the JSON of [template, values], an answer 8 bytes with its length and the JSON of an object.
Without values the answer says what the template takes. Next to nothing is imported: the process starts in a tenth of a
second, and holds 20 MB.
"""

import sys

if __name__ == "__main__":
    sys.path[:] = sys.argv[1:]  # this file's folder is no place for modules, and site was not run

import json
import resource
import signal
import socket
import struct
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

# What a request begins with: its bytes, and the seconds, bytes and characters that its render may take.
HEADER = struct.Struct(">QdQQ")


class _GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` marks what the assistant said, for training masks. Here: its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Dict:
    """In place of the type, of which `dict.update(message, ...)` would be a way around immutability."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """Without names that Python itself asks objects for, such as `__html__`. (Its attributes are the template's: no
    method of ours is found on it.)"""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *given = args
        attributes = dict(*given, **kwargs)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        Namespace.__setitem__(self, name, value)


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"{name[:40]!r} is no name for an attribute of a namespace: it begins with an underscore")


def _raise_exception(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> jinja2.Environment:
    extensions: list[str | type[Extension]] = [_GenerationBlock, "jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    functions: dict[str, Callable[..., Any]] = {
        "dict": _Dict(),
        "namespace": _Namespace,
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    environment.globals.update(functions)
    environment.filters["tojson"] = _tojson
    return environment


@lru_cache(maxsize=64)
def compile_template(source: str) -> jinja2.Template:
    return _environment().from_string(source)


def _answer(request: bytes, characters: int) -> dict[str, Any]:
    """`{"text"}`, or without values `{"takes"}`; `{"error", "line"}` where the template raises; or `{"limit"}`: what it
    wanted too much of."""
    try:
        source, values = json.loads(request)
        if values is None:
            from jaxinfer.text.template_takes import template_takes  # which has no more imports than this file

            return {"takes": vars(template_takes(_environment().parse(source)))}
        text = compile_template(source).render(values)
        return {"text": text} if len(text) <= characters else {"limit": "characters"}
    except MemoryError:
        return {"limit": "bytes"}
    except Exception as error:  # a template can raise anything
        line = error.lineno if isinstance(error, jinja2.TemplateSyntaxError) else None
        return {"error": str(error)[:1000] or type(error).__name__, "line": line}


def _bound(seconds: float, memory: int) -> None:
    """From here on the kernel ends this process after `seconds` of processor time, and gives it no more memory. (macOS
    bounds the time alone.)"""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    if sys.platform != "darwin":
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (min(memory, hard) if hard >= 0 else memory, hard))


def receive(connection: socket.socket, size: int) -> bytes:
    """So many bytes; fewer at the end."""
    data = bytearray(size)
    view = memoryview(data)
    while view and (count := connection.recv_into(view)):
        view = view[count:]
    return bytes(data[: size - len(view)])


def _serve(connection: socket.socket) -> None:
    while header := receive(connection, HEADER.size):
        size, seconds, memory, characters = HEADER.unpack(header)
        _bound(seconds, memory)
        answer = json.dumps(_answer(receive(connection, size), characters)).encode()
        signal.setitimer(signal.ITIMER_PROF, 0)
        connection.sendall(len(answer).to_bytes(8, "big") + answer)


if __name__ == "__main__":
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # who started this may ignore it, as profilers leave it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    _serve(socket.socket(fileno=0))
