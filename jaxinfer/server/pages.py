"""The page at /: plain files, which may load nothing from elsewhere."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from jaxinfer.openai.errors import ServerError
from jaxinfer.server.service import Service

FOLDER = Path(__file__).parent / "page"
KINDS = {"index.html": "text/html", "page.js": "text/javascript", "page.css": "text/css"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


async def index(service: Service, request: Request) -> Response:
    """A page to chat with."""
    return _file("index.html")


async def part(service: Service, request: Request) -> Response:
    """What it consists of."""
    name = request.path_params["name"]
    if name not in KINDS:
        raise ServerError(404, "there is nothing here")
    return _file(name)


def _file(name: str) -> Response:
    headers = {"content-security-policy": POLICY, "cache-control": "no-cache"}
    return Response(_content(name), 200, headers, KINDS[name])


@cache
def _content(name: str) -> bytes:
    return (FOLDER / name).read_bytes()
