"""Which adapters there are, and those of them that are in the host's memory."""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping

from jaxinfer.checkpoint.factors import AdapterInfo, LoadedAdapter
from jaxinfer.checkpoint.files import some
from jaxinfer.errors import RequestError


class HostAdapters:
    """Adapters by name. In memory are those that requests have, and `most` besides, which were asked for last; others
    are read again from their folders when they are asked for. Any thread may call it.

    read: reads a folder. Raises ValueError and FileNotFoundError.
    most: None: all stay.
    reads: how often one was read.
    """

    def __init__(self, read: Callable[[str | os.PathLike[str]], LoadedAdapter], most: int | None = None):
        self.most = most
        self.reads = 0
        self._read = read
        self._infos: Mapping[str, AdapterInfo] = {}  # another one at each change
        self._kept: OrderedDict[str, LoadedAdapter] = OrderedDict()  # those asked for longest ago first
        self._held: weakref.WeakValueDictionary[bytes, LoadedAdapter] = weakref.WeakValueDictionary()  # by digest
        self._changing, self._reading = threading.RLock(), threading.Lock()

    @property
    def infos(self) -> Mapping[str, AdapterInfo]:
        """What there is to say of each now, in memory or not; it does not change."""
        return self._infos

    @property
    def in_memory(self) -> int:
        """How many contents are."""
        return len(self._held)

    def load(self, name: str, folder: str | os.PathLike[str]) -> tuple[LoadedAdapter, AdapterInfo | None]:
        """Reads one, in place of another of this name, which comes too."""
        loaded = self._read(folder)
        with self._changing:
            self.reads += 1
            before = self._infos.get(name)
            self._infos = {**self._infos, name: AdapterInfo.of(loaded)}
            self._keep(name, loaded)
        return loaded, before

    def find(self, name: str) -> LoadedAdapter:
        """One that was loaded. Raises RequestError if none was, or if its folder has another one by now."""
        with self._changing:
            if (loaded := self._found(name)) is not None:
                return loaded
        with self._reading:  # one after the other: who waits for the same one finds it
            with self._changing:
                if (loaded := self._found(name)) is not None:
                    return loaded
                info = self._infos[name]
            try:
                loaded = self._read(info.folder)
            except (OSError, ValueError) as error:
                raise RequestError(f"adapter {name!r:.100} can't be read again: {error}", "adapter") from None
            if loaded.digest != info.digest:
                raise RequestError(f"adapter {name!r:.100} is another one by now in {info.folder}: load it", "adapter")
            with self._changing:
                self.reads += 1
                if self._infos.get(name) is info:
                    self._keep(name, loaded)
            return loaded

    def _found(self, name: str) -> LoadedAdapter | None:
        if (info := self._infos.get(name)) is None:
            there = some(sorted(self._infos)) or "none; LLM(adapters={NAME: FOLDER}) and load_adapter load them"
            raise RequestError(f"adapter is {name!r:.100}: there are {there}", "adapter")
        if (loaded := self._held.get(info.digest)) is not None:
            self._keep(name, loaded)
        return loaded

    def _keep(self, name: str, loaded: LoadedAdapter) -> None:
        self._held[loaded.digest] = loaded
        self._kept[name] = loaded
        self._kept.move_to_end(name)
        while self.most is not None and len(self._kept) > self.most:
            self._kept.popitem(last=False)

    def drop(self, name: str) -> AdapterInfo:
        """Forgets one. Raises RequestError."""
        with self._changing:
            self._found(name)
            self._kept.pop(name, None)
            info = self._infos[name]
            self._infos = {other: own for other, own in self._infos.items() if other != name}
            return info
