"""Continuing prompts."""

from __future__ import annotations

import queue
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxinfer.engine.generation import RequestGroup
from jaxinfer.engine.outputs import RequestOutput, error_output
from jaxinfer.engine.prompts import Encoded, Prompt, encode_prompt, prompt_list
from jaxinfer.engine.thread import Submission
from jaxinfer.errors import RequestError, UnsupportedError
from jaxinfer.sampling.params import SamplingParams
from jaxinfer.tasks.task import Task, for_each
from jaxinfer.text.base import Tokenizer


@dataclass(frozen=True)
class PromptAsked:
    """A prompt to continue.

    index: its place in the input.
    prompt: as it was given, or encoded.
    params: its own.
    priority: lower runs earlier.
    adapter: see Encoded; a prompt's own comes before it.
    """

    index: int
    prompt: Prompt | Encoded
    params: SamplingParams
    priority: int = 0
    adapter: Any = None


class GenerateTask(Task[PromptAsked, RequestOutput]):
    """Prompts to continuations."""

    noun = "prompt"
    done = "Generated"

    def checked(self, asked: PromptAsked) -> PromptAsked:
        encoded = self._encoded(asked)
        self.engine.check(encoded.ids, asked.params)
        self.engine.check_adapter(encoded.adapter)
        return replace(asked, prompt=encoded, adapter=None)  # which is in it

    def request(self, asked: PromptAsked) -> RequestGroup:
        text, ids, salt, adapter = self._encoded(asked)
        return self.engine.new_group(ids, asked.params, text, asked.priority, salt, adapter)

    def failure(self, asked: PromptAsked, error: ValueError) -> RequestOutput:
        return error_output(asked.index, str(error))

    def stream(
        self, prompt: Prompt, params: SamplingParams, adapter: Any = None
    ) -> Iterator[tuple[str, RequestOutput]]:
        """Pairs of new text and the output so far; the last one is finished. Raises ValueError at once."""
        group = self.request(PromptAsked(0, prompt, params, adapter=adapter))
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
            return adapted(asked.prompt, self.tokenizer, asked.adapter)
        if not isinstance(asked.params, SamplingParams):
            kind = type(asked.params).__name__
            raise RequestError(f"sampling_params is a {kind}: it must be SamplingParams", "sampling_params")
        return adapted(asked.prompt, self.tokenizer, asked.adapter)


def adapted(prompt: Prompt | Encoded, tokenizer: Tokenizer, adapter: Any) -> Encoded:
    """A prompt as tokens, with this adapter, unless it says itself which it has, or that it has none. Raises
    RequestError."""
    encoded = prompt if isinstance(prompt, Encoded) else encode_prompt(prompt, tokenizer)
    said = encoded.adapter is not None or (isinstance(prompt, Mapping) and "adapter" in prompt)
    return encoded if said or adapter is None else encoded._replace(adapter=adapter)


def prompts_asked(
    prompts: Any,
    params: SamplingParams | Sequence[SamplingParams],
    priority: Sequence[int] | None,
    adapter: Any = None,
) -> list[PromptAsked]:
    """One prompt or a list of them, with parameters and an adapter for all or one each. Raises ValueError."""
    listed = prompt_list(prompts)
    each = for_each("sampling_params", params, listed)
    adapters = for_each("adapter", adapter, listed)
    if priority is not None and len(priority) != len(listed):
        raise RequestError.at("priority", f"{len(priority)} for {len(listed)} prompts; give one each")
    priorities = [0] * len(listed) if priority is None else priority
    if not all(isinstance(p, int) for p in priorities):
        raise RequestError(f"priority is {list(priorities)}: it must be integers", "priority")
    return [PromptAsked(i, *fields) for i, fields in enumerate(zip(listed, each, priorities, adapters, strict=True))]


def prompts_as_they_come(
    prompts: Iterable[Prompt | tuple[Prompt, SamplingParams]], default: SamplingParams, adapter: Any = None
) -> Iterator[PromptAsked]:
    """Prompts, and pairs of a prompt and its parameters."""
    for i, given in enumerate(prompts):
        own = isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], SamplingParams)
        pair: Any = given if own else (given, default)
        yield PromptAsked(i, pair[0], pair[1], adapter=adapter)
