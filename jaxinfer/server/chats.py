"""From a chat to a prompt, and from a model's text to messages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

from jaxinfer.errors import UnsupportedError
from jaxinfer.openai.requests import ChatRequest
from jaxinfer.sampling.params import SamplingParams
from jaxinfer.sampling.structured import StructuredOutputsParams
from jaxinfer.text.base import Tokenizer
from jaxinfer.text.calls import schemas
from jaxinfer.text.formats import HARMONY, enforced, message_format, opened_by, reasoning_of, shows_special, tools_of
from jaxinfer.text.scanner import Format, Scanner
from jaxinfer.text.strict import asks_strictness, required_grammar, strict_grammar, strict_section

AUTO = "auto"


@dataclass(frozen=True)
class Prepared:
    """A chat as the engine gets it.

    ids: the prompt. params: with special tokens in the text where they are markers of it. scanners: one for each
    continuation, for its text.
    """

    ids: list[int]
    params: SamplingParams
    scanners: list[Scanner]


class ChatFormats:
    """What a checkpoint's chat templates show of how its model writes calls and reasoning; or what was said instead."""

    def __init__(self, tokenizer: Tokenizer, encode: Callable[[str, bool], list[int]], tools: str, reasoning: str):
        self._tokenizer, self._encode, self._tools, self._reasoning = tokenizer, encode, tools, reasoning
        self._format = lru_cache(64)(self._made)  # requests may bring templates

    def prepare(self, request: ChatRequest) -> Prepared:
        """Takes its time: renders and tokenizes. Raises RequestError."""
        source = request.template.get("chat_template") or self._source(bool(request.tools))
        for name in ("documents", "reasoning_effort"):
            if name in request.template and name not in source:
                raise UnsupportedError(f"{name}: the model's chat template takes none; leave it out", name)
        if request.tools is not None and "tools" not in source:
            raise UnsupportedError("tools: the model's chat template takes none; leave them out", "tools")
        form, special = self._format(source)
        schemas_at = f"tools[].{request.parameters}"
        params, most = request.params, None if request.parallel and len(request.must_call) != 1 else 1
        if request.must_call:
            assert request.tools is not None
            # A form that is asked for beside it is one of text, which there will be none of.
            grammar = required_grammar(request.tools, request.must_call, most, request.parameters)
            form = enforced(form)
            params = replace(params, structured_outputs={"grammar": grammar, "asked_as": schemas_at})
        elif request.tools is not None:
            params = _unless_called(params, form)
            section = strict_section(form)
            if section is not None and params.structured_outputs is None and asks_strictness(request.tools):
                grammar = strict_grammar(section, request.tools, most, self._special, request.parameters)
                params = replace(params, structured_outputs={"grammar": grammar, "asked_as": schemas_at})
        messages = request.messages if "developer" in source else [_as_system(message) for message in request.messages]
        prompt = self._tokenizer.chat_prompt(messages, request.tools, **request.template)
        ids = self._encode(prompt, request.add_special_tokens)
        if special and params.skip_special_tokens and params.detokenize:
            params = replace(params, skip_special_tokens=False)
        known, opened = None if request.tools is None else schemas(request.tools), opened_by(form, prompt)
        params = _after_reasoning(params, form, prompt)
        scanners = [Scanner(form, known, opened, most) for _ in range(params.n)]
        return Prepared(ids, params, scanners)

    def _source(self, with_tools: bool) -> str:
        templates = self._tokenizer.chat_templates.templates
        return templates.get("tool_use", templates.get("default", "")) if with_tools else templates.get("default", "")

    @cached_property
    def _special(self) -> list[str]:
        return [self._tokenizer.decode_raw([i]) for i in sorted(self._tokenizer.special_ids)]

    def _made(self, source: str) -> tuple[Format, bool]:
        """The format, and whether special tokens are among its markers."""
        tools = tools_of(source) if self._tools == AUTO else self._tools
        reasoning = reasoning_of(source) if self._reasoning == AUTO else self._reasoning
        form = message_format(tools, reasoning)
        if shows_special(form, self._special):
            return message_format(tools, reasoning, self._special), True
        return form, False


def _unless_called(params: SamplingParams, form: Format) -> SamplingParams:
    """What an answer must look like, if one is asked for, leaves the model free to call in its own way instead."""
    opens = [section.opens for section in form.sections if section.kind == "call" and not section.bare]
    if not opens:
        raise UnsupportedError(
            "tools: the chat template does not show how the model writes calls; start the server with "
            "--tool-call-parser",
            "tools",
        )
    if params.structured_outputs is None:
        return params
    asked = StructuredOutputsParams.of(params.structured_outputs)
    return replace(params, structured_outputs=replace(asked, unless=opens))


def _after_reasoning(params: SamplingParams, form: Format, prompt: str) -> SamplingParams:
    """What an answer must look like begins after the reasoning, unless the prompt has closed that."""
    sections = [section for section in form.sections if section.kind == "reasoning"]
    closed = any(prompt.rstrip().endswith(section.closes) for section in sections)
    if params.structured_outputs is None or not sections or closed:
        return params
    asked = StructuredOutputsParams.of(params.structured_outputs)
    if sections[0] in HARMONY:
        problem = "the model writes channels, in which no form of an answer can be enforced; leave it out"
        raise UnsupportedError.at(asked.place(), problem)
    return replace(params, structured_outputs=replace(asked, after=asked.after or sections[0].closes[0]))


def _as_system(message: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's new name for it, which few templates know."""
    return message | {"role": "system"} if isinstance(message, dict) and message.get("role") == "developer" else message
