"""Programs that are compiled before they are called: each once, by other threads, and never behind our back."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

import jax

from jaxinfer.engine.background import afterwards, in_background
from jaxinfer.engine.compiled import Folder
from jaxinfer.engine.executables import ExecutableCache
from jaxinfer.engine.malloc import keep_memory, trim_memory
from jaxinfer.engine.programs import Key, ModelPrograms


class ReadyPrograms:
    """A table's, by key.

    on_compile: told, in a few words, what is waited for.
    compiled, kept: where they may be compiled already.
    compile_seconds: that calls have waited so far. compilations: how many there were.
    """

    def __init__(
        self,
        table: ModelPrograms,
        on_compile: Callable[[str], None] | None = None,
        compiled: Folder | None = None,
        kept: ExecutableCache | None = None,
    ):
        self._table = table
        if table.devices[0].platform == "cpu":
            keep_memory()
        self.on_compile = on_compile
        self.compile_seconds = 0.0
        self.compilations = 0
        self._compiled = compiled
        self._kept = kept
        self._executables: dict[Key, jax.stages.Compiled] = {}
        self._coming: dict[Key, Future[None]] = {}  # those that threads have begun to compile
        self._abandoned: Future[None] = Future()

    def abandon(self) -> None:
        """Nobody waits any more for a program that is being compiled: before `close`, from another thread."""
        if not self._abandoned.done():
            self._abandoned.set_result(None)

    @property
    def abandoned(self) -> bool:
        """Whether a call may have failed for that."""
        return self._abandoned.done()

    def warm_up(self, keys: Sequence[Key] | None = None) -> None:
        """Compiles every program that can be needed, or these, several at a time."""
        what = "loaded" if self._compiled else "compiled"
        keys = self._table.keys() if keys is None else keys
        self._prepare(keys, lambda done, count: f"{what} {done} of {count} programs")

    def _ready(self, keys: Sequence[Key], then: Sequence[Key] = ()) -> list[Any]:
        """Programs that were compiled ahead: a bucket compiles once, and never behind our back. While some of them are
        waited for, those of `then` are begun where a thread has nothing to do."""
        if missing := [key for key in keys if key not in self._executables]:
            words = " and ".join(f"{kind} for {size} tokens" for kind, size in missing)
            what = f"{'loading' if self._compiled else 'compiling'} {words}"
            self._prepare(missing, lambda done, count: "running" if done == count else what, then)
        return [self._executables[key] for key in keys]

    def _prepare(self, keys: Sequence[Key], words: Callable[[int, int], str], then: Sequence[Key] = ()) -> None:
        """Waits until these programs are there, which other threads compile: Ctrl-C is heard at once, and what had
        begun by then is there later for whoever needs it. words: what is said when so many are done, of how many."""
        missing = [key for key in keys if key not in self._executables]
        coming = [key for key in then if key not in self._executables]
        anew = [key for key in (*missing, *coming) if key not in self._coming or self._coming[key].done()]
        start = time.perf_counter()
        try:
            with in_background(self._compile, anew) as futures:
                self._coming |= dict(zip(anew, futures, strict=True))
                for done, key in enumerate(missing):
                    self._say(words(done, len(missing)))
                    wait([self._coming[key], self._abandoned], return_when=FIRST_COMPLETED)
                    if not self._coming[key].done():
                        raise ValueError("the engine was closed while a program was compiled")
                    self._coming[key].result()
        finally:
            self.compile_seconds += time.perf_counter() - start
        if missing:
            self._say(words(len(missing), len(missing)))

    def _say(self, what: str) -> None:
        if self.on_compile is not None:
            self.on_compile(what)

    def _compile(self, key: Key) -> None:
        executable = None
        for earlier in (self._compiled, self._kept):
            if executable is None and earlier is not None:
                executable = earlier.fetch(self._table, key)
        if executable is None:
            executable = self._table[key].lower().compile()
            self.compilations += 1
            if self._kept is not None:
                afterwards(self._kept.store, self._table, key, executable)
        self._executables[key] = executable
        trim_memory()  # the compiler leaves a hundred megabytes behind each time
