"""Low-rank adapters, loaded and unloaded by requests, under vLLM's names; off where there is no `adapter_dir`."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from jaxinfer.checkpoint.adapter_config import CONFIG
from jaxinfer.checkpoint.folder import PICKLED, SAFETENSORS
from jaxinfer.engine.adapter_methods import MOST_NAME, may_name
from jaxinfer.errors import RequestError
from jaxinfer.models.tasks import GENERATE
from jaxinfer.openai.answers import Json
from jaxinfer.openai.errors import ServerError
from jaxinfer.openai.fields import Fields
from jaxinfer.places import inside
from jaxinfer.server.service import Service

FILES = (CONFIG, SAFETENSORS.adapter, PICKLED.adapter)


async def load_adapter(service: Service, request: Request, body: Json) -> Response:
    """Loads the one in a folder below `adapter_dir`, under a name that requests then give as their model."""
    root = _root(service)
    name, path, again = read_loading(Fields(body))
    if name in service.config.names:
        raise RequestError(f"lora_name is {name!r}: so the model itself is called", "lora_name")
    with service.admitted(request.state.key):
        async with service.changing:
            if name in service.adapters and not again:
                raise RequestError(f"lora_name is {name!r}: it is loaded already; say load_inplace", "lora_name")
            folder = _folder(root, path)
            for other, own in service.adapters.items():  # or memory would be anybody's
                if other != name and own.folder == str(folder):
                    raise RequestError(f"lora_path is {path!r:.120}: it is loaded already, as {other!r}", "lora_path")
            try:
                await service.prepared(lambda: service.llm.engine.load_adapter(name, folder))
            except (ValueError, OSError) as error:
                raise RequestError(str(error).replace(f"{root}/", ""), "lora_path") from None
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


async def unload_adapter(service: Service, request: Request, body: Json) -> Response:
    """Forgets one; requests that have it go on."""
    _root(service)
    name = read_unloading(Fields(body))
    with service.admitted(request.state.key):
        async with service.changing:
            if name is None or name not in service.adapters:
                there = ", ".join(service.adapters) or "none"
                raise ServerError(404, f"lora_name is {name!r:.80}: there are {there}", "lora_name")
            service.llm.engine.unload_adapter(name)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


def read_loading(fields: Fields) -> tuple[str, str, bool]:
    """Of a body: a name, a folder, and whether one of that name may be there. Raises RequestError."""
    name, path, again = fields.text("lora_name"), fields.text("lora_path"), fields.flag("load_inplace")
    fields.skip(("lora_int_id",))
    fields.end()
    if name is None or not may_name(name):
        raise RequestError(f"lora_name must be a name of at most {MOST_NAME} characters", "lora_name")
    if not path:
        raise RequestError("lora_path is missing: the name of a folder below the server's --adapter-dir", "lora_path")
    return name, path, again


def read_unloading(fields: Fields) -> str | None:
    """Of a body: the name. Raises RequestError."""
    name = fields.text("lora_name")
    fields.skip(("lora_int_id",))
    fields.end()
    return name


def _root(service: Service) -> Path:
    """Raises ServerError where nobody may load or unload any."""
    if service.config.adapter_dir is None:
        raise ServerError(403, "adapters are not loaded by requests here: start the server with --adapter-dir")
    service.model(None, GENERATE)
    return Path(service.config.adapter_dir)


def _folder(root: Path, path: str) -> Path:
    """The folder of this name below the root, with nothing in it that is read from elsewhere. Raises RequestError, and
    ServerError where there is none."""
    try:
        folder = inside(root, path, "lora_path")
        for file in FILES:
            inside(root, f"{path}/{file}", "lora_path")
    except ValueError:
        said = "it must be the name of a folder below the server's --adapter-dir, without .. and links that lead out"
        raise RequestError(f"lora_path is {path!a:.120}: {said}", "lora_path") from None
    if not folder.is_dir():
        raise ServerError(404, f"lora_path is {path!a:.120}: there is no such folder", "lora_path")
    return folder
