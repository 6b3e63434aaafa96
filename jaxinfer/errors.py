"""What is raised where a request, a checkpoint or the engine's state stands in the way, and which HTTP status a server
answers with. Each has one line as its text: where, what is wrong, what to do. Wrong options of loading are plain
ValueErrors, and what is not there is an OSError: no server runs yet when they come."""

from __future__ import annotations

import re
from typing import Self


class RequestError(ValueError):
    """A request that can't be served as it is: 400.

    param: the parameter or argument that is wrong, None where it is no single one.
    """

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param

    @classmethod
    def at(cls, where: str, problem: str) -> Self:
        """What is wrong at a place such as `messages[0].content`, of which `messages` is the param."""
        return cls(f"{where}: {problem}", re.split(r"\W", where, maxsplit=1)[0])


class ContextLengthError(RequestError):
    """Prompt, or prompt and output together, are longer than the model or its cache takes: 400, with OpenAI's code
    context_length_exceeded."""


class UnsupportedError(RequestError):
    """What this model, or jaxinfer, does not do for anybody: 400, or 501."""


class CheckpointError(ValueError):
    """Files of a model that are damaged, contradict each other, or are of no model that is known: 500."""


class EngineClosed(ValueError):
    """The engine was closed: nothing can be asked of it any more: 503."""


class QueueFullError(RuntimeError):
    """More requests wait than `max_queued` allows: 429 (or 503), try again later."""


def placed(where: str, error: ValueError) -> ValueError:
    """The same error, saying of which of several things it is."""
    text = f"{where}: {error}"
    return type(error)(text, error.param) if isinstance(error, RequestError) else ValueError(text)
