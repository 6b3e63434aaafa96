"""Room for calls that nest as deeply as a grammar: where the stack ends in llguidance's compiler, the process does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

# Of a chain of references as long as a schema may be. It is address space: memory is taken as it is reached.
BYTES = 2**29
_lock = threading.Lock()


def on_large_stack(call: Callable[[], Result]) -> Result:
    """What it gives, in a thread of its own; raises what it raises."""
    results: list[Result] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="jaxinfer-grammar", daemon=True)
    with _lock:
        before = threading.stack_size(BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
