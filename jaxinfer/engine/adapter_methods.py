"""Which low-rank adapters are loaded beside an engine's weights, by name."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from jaxinfer.checkpoint.factors import AdapterInfo, LoadedAdapter, read_adapter
from jaxinfer.checkpoint.files import some
from jaxinfer.checkpoint.hub import resolve
from jaxinfer.engine.host_adapters import HostAdapters
from jaxinfer.engine.runner import Runner
from jaxinfer.engine.shards import DataParallelScheduler
from jaxinfer.errors import RequestError

MOST_NAME = 200  # characters


def may_name(name: object) -> bool:
    """Whether an adapter may be called that."""
    return isinstance(name, str) and 0 < len(name) <= MOST_NAME and name.isprintable()


class AskedAdapter(NamedTuple):
    """An adapter as somebody asks for it.

    name: one that is loaded, or that it is to have then.
    path: of a folder or a hub id, from which it comes; None: it must be loaded.
    """

    name: str
    path: str | os.PathLike[str] | None = None

    @classmethod
    def of(cls, asked: Any) -> AskedAdapter:
        """Of a name, or of what has the fields of vLLM's LoRARequest. Raises RequestError."""
        if isinstance(asked, str):
            return cls(asked)
        name = getattr(asked, "lora_name", None)
        paths = (getattr(asked, field, None) for field in ("lora_path", "path", "lora_local_path"))
        path = next((path for path in paths if path), None)
        if not isinstance(name, str) or not name or not isinstance(path, str | os.PathLike):
            raise RequestError(f"adapter is {asked!r:.100}: it must be the name of one that is loaded", "adapter")
        if getattr(asked, "load_inplace", False):
            raise RequestError(f"load_inplace of {name!r}: LLM.load_adapter(name, folder) reads one again", "adapter")
        return cls(name, path)


class AdapterMethods:
    """Those of Engine that are about them. Any thread may call them.

    adapters: by name, and in the host's memory.
    adapter_tokens: that were sampled with each, for requests that have ended.
    """

    runner: Runner
    scheduler: DataParallelScheduler
    adapters: HostAdapters
    adapter_tokens: dict[str, int]

    def adapter(self, asked: Any) -> tuple[str, LoadedAdapter | None]:
        """The name of what is asked for, and the adapter; of None neither. Raises ValueError."""
        name = self.check_adapter(asked)
        return name, self.adapters.find(name) if name else None

    def check_adapter(self, asked: Any) -> str:
        """The name of what is asked for, "" of None. vLLM's LoRARequest is loaded where none of its name and path is.
        Raises ValueError."""
        if asked is None:
            return ""
        name, path = AskedAdapter.of(asked)
        found = self.adapters.infos.get(name)
        if path is not None:
            try:
                folder = resolve(path)
                if found is None or found.folder != os.fspath(folder):
                    self.load_adapter(name, folder)
            except OSError as error:
                raise RequestError(f"adapter {name!r:.100}: {error}", "adapter") from None
        elif found is None:
            self.adapters.find(name)  # says which there are
        return name

    def load_adapter(self, name: str, folder: str | os.PathLike[str]) -> LoadedAdapter:
        """Reads one, in place of another of this name. Any thread may call it: it goes to the devices when the first
        request with it runs. Raises ValueError and FileNotFoundError."""
        programs = self.runner.programs
        if not may_name(name):
            raise ValueError(
                f"an adapter's name is {name!r:.100}: it must be a text of up to {MOST_NAME} printable characters"
            )
        if not programs.adapter_limits.slots:
            raise ValueError("there is no room for adapters beside the weights: load the model with max_adapters")
        loaded, before = self.adapters.load(name, folder)
        if before is not None:
            self.scheduler.adapters.forget(before.digest)
        return loaded

    def read_adapter(self, folder: str | os.PathLike[str]) -> LoadedAdapter:
        """As it may be beside these weights. Raises ValueError and FileNotFoundError."""
        programs = self.runner.programs
        loaded = read_adapter(folder, self.runner.model, programs.adapter_limits.rank, self.runner)
        if others := loaded.factors.keys() - programs.adapter.keys():
            option = "adapted_vocabulary" if others & set(self.runner.model.vocabulary) else "adapted_experts"
            raise ValueError(
                f"{folder}: changes {some(sorted(others))}: load the model with {option}=True, so that there is room"
            )
        return loaded

    def unload_adapter(self, name: str) -> None:
        """Forgets one; requests that have it go on. Raises RequestError."""
        unloaded = self.adapters.drop(name)
        self.adapter_tokens.pop(name, None)
        self.scheduler.adapters.forget(unloaded.digest)

    def list_adapters(self) -> dict[str, AdapterInfo]:
        """Those that are loaded, by name."""
        return dict(self.adapters.infos)
