"""Continuing prompts."""

from __future__ import annotations

import queue
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxinfer.engine.generation import RequestGroup
from jaxinfer.engine.outputs import RequestOutput, error_output
from jaxinfer.engine.prompts import Encoded, Prompt, encode_prompt, prompt_list
from jaxinfer.engine.thread import Submission
from jaxinfer.errors import RequestError, UnsupportedError
from jaxinfer.sampling.params import SamplingParams
from jaxinfer.tasks.task import Task


@dataclass(frozen=True)
class PromptAsked:
    """A prompt to continue.

    index: its place in the input.
    prompt: as it was given, or encoded.
    params: its own.
    priority: lower runs earlier.
    adapter: its name; None: none, or the prompt's own.
    """

    index: int
    prompt: Prompt | Encoded
    params: SamplingParams
    priority: int = 0
    adapter: str | None = None


class GenerateTask(Task[PromptAsked, RequestOutput]):
    """Prompts to continuations."""

    noun = "prompt"
    done = "Generated"

    def checked(self, asked: PromptAsked) -> PromptAsked:
        encoded = self._encoded(asked)
        self.engine.check(encoded.ids, asked.params)
        self.engine.adapter(encoded.adapter)
        return replace(asked, prompt=encoded)

    def request(self, asked: PromptAsked) -> RequestGroup:
        text, ids, salt, adapter = self._encoded(asked)
        return self.engine.new_group(ids, asked.params, text, asked.priority, salt, adapter)

    def failure(self, asked: PromptAsked, error: ValueError) -> RequestOutput:
        return error_output(asked.index, str(error))

    def stream(self, prompt: Prompt, params: SamplingParams) -> Iterator[tuple[str, RequestOutput]]:
        """Pairs of new text and the output so far; the last one is finished. Raises ValueError at once."""
        group = self.request(PromptAsked(0, prompt, params))
        if len(group.members) != 1:
            raise UnsupportedError(
                f"sampling parameter n is {params.n}: a stream has one continuation; use generate", "n"
            )
        outputs: queue.SimpleQueue[RequestOutput | BaseException] = queue.SimpleQueue()

        def listener(group: RequestGroup, error: BaseException | None) -> None:
            outputs.put(error or group.output())

        def pieces() -> Iterator[tuple[str, RequestOutput]]:
            try:
                yield "", group.output()  # taken here, below: a generator that has not begun would not clean up
                finished, text = False, ""
                while not finished:
                    output = outputs.get()
                    if isinstance(output, BaseException):
                        raise output
                    finished, seen, text = output.finished, len(text), output.outputs[0].text
                    yield text[seen:], output
            finally:
                self.thread.abort(group)

        stream = pieces()
        next(stream)
        self.thread.submit([Submission(group, listener, streams=True)])
        return stream

    def _encoded(self, asked: PromptAsked) -> Encoded:
        if isinstance(asked.prompt, Encoded):
            return asked.prompt
        if not isinstance(asked.params, SamplingParams):
            kind = type(asked.params).__name__
            raise RequestError(f"sampling_params is a {kind}: it must be SamplingParams", "sampling_params")
        encoded = encode_prompt(asked.prompt, self.tokenizer)
        return encoded if asked.adapter is None else encoded._replace(adapter=asked.adapter)


def prompts_asked(
    prompts: Any,
    params: SamplingParams | Sequence[SamplingParams],
    priority: Sequence[int] | None,
    adapter: str | Sequence[str | None] | None = None,
) -> list[PromptAsked]:
    """One prompt or a list of them, with parameters and an adapter for all or one each. Raises ValueError."""
    listed = prompt_list(prompts)
    each = params if isinstance(params, list | tuple) else [params] * len(listed)
    adapters = adapter if isinstance(adapter, list | tuple) else [adapter] * len(listed)
    for name, values in (("sampling_params", each), ("priority", priority), ("adapter", adapters)):
        if values is not None and len(values) != len(listed):
            raise RequestError.at(name, f"{len(values)} for {len(listed)} prompts; give one for all, or one each")
    priorities = [0] * len(listed) if priority is None else priority
    if not all(isinstance(p, int) for p in priorities):
        raise RequestError(f"priority is {list(priorities)}: it must be integers", "priority")
    return [PromptAsked(i, *fields) for i, fields in enumerate(zip(listed, each, priorities, adapters, strict=True))]


def prompts_as_they_come(
    prompts: Iterable[Prompt | tuple[Prompt, SamplingParams]], default: SamplingParams
) -> Iterator[PromptAsked]:
    """Prompts, and pairs of a prompt and its parameters."""
    for i, prompt in enumerate(prompts):
        own = isinstance(prompt, tuple) and len(prompt) == 2 and isinstance(prompt[1], SamplingParams)
        yield PromptAsked(i, *prompt) if own else PromptAsked(i, prompt, default)  # type: ignore[arg-type]
