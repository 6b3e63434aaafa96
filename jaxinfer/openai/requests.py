"""Bodies of /v1/completions and /v1/chat/completions: what is asked for, checked. All functions raise RequestError."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxinfer.errors import RequestError, UnsupportedError
from jaxinfer.openai.fields import Fields, changed, kind, shown
from jaxinfer.sampling.params import SamplingParams
from jaxinfer.text.messages import normalize_messages

COMPLETION_TOKENS = 16  # OpenAI's default of completions; a chat has none
# Labels, accounting and caching on OpenAI's side: they say nothing about the answer. `model` is for who chooses one.
LABELS = (
    *("model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
    *("prompt_cache_retention", "verbosity"),
)
MOST_PRIORITY = 1000
PARAMETERS = "function.parameters"  # of a tool


@dataclass(frozen=True, kw_only=True)
class Options:
    """What both kinds of requests have besides the prompt.

    params: how it is sampled.
    stream: answer in chunks; include_usage, continuous_usage: with a last one that counts tokens, or counts in each.
    return_token_ids: the answer has the ids, too.
    cache_salt: see `jaxinfer.engine.prompts.Encoded`.
    priority: lower runs earlier.
    truncate_prompt_tokens: only so many of the prompt's last tokens are used; -1: as many as fit; None: all.
    """

    params: SamplingParams
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    return_token_ids: bool = False
    cache_salt: str = ""
    priority: int = 0
    truncate_prompt_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class CompletionRequest(Options):
    """prompts: each is text or token ids. echo: the answer begins with the prompt. add_special_tokens: around text."""

    prompts: list[str | list[int]]
    echo: bool = False
    add_special_tokens: bool = True


@dataclass(frozen=True, kw_only=True)
class ChatRequest(Options):
    """messages: as chat templates take them. tools: JSON schemas, if there are any that may be called. must_call: names
    of those of which one must be; none: nothing must. template: further arguments of `Tokenizer.chat_prompt`. parallel:
    whether there may be several calls. include_reasoning: whether the answer shows it. add_special_tokens: around what
    the template writes. repeated: what the answer repeats of the request. parameters: where a tool has its schema, as
    errors say it."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    must_call: tuple[str, ...] = ()
    template: dict[str, Any] = field(default_factory=dict)
    parallel: bool = True
    include_reasoning: bool = True
    add_special_tokens: bool = False
    repeated: dict[str, Any] = field(default_factory=dict)
    parameters: str = PARAMETERS


def completion_request(fields: Fields, defaults: SamplingParams) -> CompletionRequest:
    """Of a completion. defaults: of what is not given."""
    listed = fields.prompts("prompt")
    fields.only("suffix", "")
    echo, special = fields.flag("echo"), fields.flag("add_special_tokens", True)
    best_of = fields.take("best_of")
    given = fields.sampling()
    if best_of not in (None, given.get("n", 1)):
        raise UnsupportedError("best_of is not supported, unless it is n; leave it out", "best_of")
    if echo and given.get("logprobs") is not None:
        given["prompt_logprobs"] = given["logprobs"]
    options = _options(fields, defaults.with_changes(**given))
    return CompletionRequest(prompts=listed, echo=echo, add_special_tokens=special, **options)


def chat_request(fields: Fields, defaults: SamplingParams, own_template: bool = False) -> ChatRequest:
    """Of a chat. own_template: a request may have a chat template of its own, which is a program."""
    messages = conversation(fields.take("messages"))
    fields.only("modalities", ["text"])
    fields.only("audio")
    fields.only("echo", False)
    tools, must = _tools(fields)
    parallel = fields.flag("parallel_tool_calls", True)
    template = _template(fields, own_template)
    reasoning, special = fields.flag("include_reasoning", True), fields.flag("add_special_tokens", False)
    most = {"max_tokens": "max_completion_tokens"} if "max_completion_tokens" in fields else {}
    params = changed(defaults, _chat_params(fields), logprobs="top_logprobs", **most)
    return ChatRequest(
        messages=messages,
        tools=tools,
        must_call=must,
        template=template,
        parallel=parallel,
        include_reasoning=reasoning,
        add_special_tokens=special,
        **_options(fields, params),
    )


def conversation(messages: Any) -> list[dict[str, Any]]:
    """Messages, checked: what the model's chat template takes becomes of them when it is known, which also says why it
    takes no images."""
    with contextlib.suppress(UnsupportedError):
        normalize_messages(messages)
    return list(messages)


def check_tools(tools: Any, parameters: str = PARAMETERS) -> list[dict[str, Any]]:
    """A list of {"type": "function", "function": {"name": ..., "parameters": schema}}. parameters: where the request
    has that schema. Raises RequestError."""
    if not isinstance(tools, list):
        raise RequestError(f"tools must be a list, and is {kind(tools)}", "tools")
    names = set()
    for i, tool in enumerate(tools):
        where, schema = f"tools[{i}]", f"tools[{i}].{parameters}"
        if not isinstance(tool, dict) or tool.get("type") != "function":
            raise UnsupportedError(
                f"{where} must be an object whose type is 'function'; leave other tools out", "tools"
            )
        inner = where + (".function" if parameters == PARAMETERS else "")
        function = tool.get("function")
        function = function if isinstance(function, dict) else {}
        name = function.get("name")
        if not isinstance(name, str) or not name or len(name) > 256:
            raise RequestError(f"{inner} must have a name, text of 1 to 256 characters", "tools")
        if not isinstance(function.get("parameters"), dict | None):
            raise RequestError(f"{schema} must be a JSON schema, an object", "tools")
        own = (function.get("parameters") or {}).get("type", "object")
        if "object" not in (own if isinstance(own, list) else [own]):
            raise RequestError(f"{schema}.type is {own!r:.100}: arguments are an object", "tools")
        if name in names:
            raise RequestError(f"{inner}.name is {name!r:.80}, as that of a tool before it; rename it", "tools")
        names.add(name)
    return tools


def with_salt(salt: str | None) -> str:
    """A request's own salt. Raises RequestError for one that is empty."""
    if salt == "":
        raise RequestError("cache_salt is empty: give some text, or leave it out", "cache_salt")
    return salt or ""


def _options(fields: Fields, params: SamplingParams) -> dict[str, Any]:
    """Takes all that is left; refuses what is nobody's."""
    stream = fields.flag("stream")
    usage = fields.inner("stream_options")
    if usage is not None and not stream:
        raise RequestError("stream_options are for stream: true; leave them out", "stream_options")
    include, continuous = False, False
    if usage is not None:
        include, continuous = usage.flag("include_usage"), usage.flag("continuous_usage_stats")
        usage.only("include_obfuscation", False, True)
        usage.end()
    options = {
        "params": params,
        "stream": stream,
        "include_usage": include,
        "continuous_usage": continuous,
        "return_token_ids": fields.flag("return_token_ids"),
        "cache_salt": with_salt(fields.text("cache_salt")),
        "priority": fields.integer("priority", -MOST_PRIORITY, MOST_PRIORITY, 0),
        "truncate_prompt_tokens": fields.integer("truncate_prompt_tokens", -1, 2**31 - 1),
    }
    if options["truncate_prompt_tokens"] == 0:
        raise RequestError("truncate_prompt_tokens is 0: it must be -1, for as many as fit, or more", "prompt")
    fields.only("prediction")
    fields.only("web_search_options")
    fields.only("return_tokens_as_token_ids", False, remedy="return_token_ids has them beside the text")
    fields.only("spaces_between_special_tokens", True)
    fields.skip((*LABELS, "request_id"))
    fields.end()
    return options


def _tools(fields: Fields) -> tuple[list[dict[str, Any]] | None, tuple[str, ...]]:
    """Those that may be called, and that must be."""
    given = fields.take("tools")
    tools = check_tools([] if given is None else given)
    choice = fields.take("tool_choice", "auto" if tools else "none")
    if choice == "none":
        return None, ()
    if choice == "auto":
        if not tools:
            raise RequestError("tool_choice is 'auto', and there are no tools; leave it out", "tool_choice")
        return tools, ()
    name = choice["function"].get("name") if _names_a_function(choice) else None
    if choice != "required" and not isinstance(name, str):
        raise RequestError(
            f"tool_choice is {shown(choice)}: it must be 'none', 'auto', 'required', or an object with a function",
            "tool_choice",
        )
    return tools, must_call(tools, name)


def must_call(tools: list[dict[str, Any]], name: str | None) -> tuple[str, ...]:
    """Names of tools of which one must be called: of all, or this one. Raises RequestError if there is none such."""
    names = tuple(tool["function"]["name"] for tool in tools if name in (None, tool["function"]["name"]))
    if not names:
        raise RequestError(f"tool_choice asks for {name or 'a call'!r:.80}, and tools has none such", "tool_choice")
    return names


def _names_a_function(choice: Any) -> bool:
    return isinstance(choice, dict) and choice.get("type") == "function" and isinstance(choice.get("function"), dict)


def _template(fields: Fields, own: bool) -> dict[str, Any]:
    """Arguments of chat_prompt."""
    given = fields.take("chat_template_kwargs", {})
    if not isinstance(given, Mapping):
        raise RequestError(f"chat_template_kwargs must be an object, and is {kind(given)}", "chat_template_kwargs")
    taken = {"messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template"}
    if wrong := sorted(taken & given.keys()):
        raise RequestError(f"chat_template_kwargs has {wrong[0]}, which is a field of its own", "chat_template_kwargs")
    template = dict(given)
    for name in ("documents", "reasoning_effort"):
        if name in fields:
            template[name] = fields.take(name)
    if "add_generation_prompt" in fields:
        template["add_generation_prompt"] = fields.flag("add_generation_prompt")
    if fields.flag("continue_final_message"):
        template["continue_final_message"] = True
    if "chat_template" in fields:
        if not own:
            raise UnsupportedError(
                "chat_template: a template is a program, and this server takes none from requests; leave it out",
                "chat_template",
            )
        template["chat_template"] = fields.text("chat_template")
    return template


def _chat_params(fields: Fields) -> dict[str, Any]:
    """With the parameters that chat/completions spells in its own way."""
    most = fields.take("max_completion_tokens")
    wanted, top = fields.flag("logprobs"), fields.take("top_logprobs")
    given = fields.sampling()
    if most is not None and given.setdefault("max_tokens", most) != most:
        raise RequestError("max_tokens and max_completion_tokens differ: leave one out", "max_tokens")
    if top is not None and not wanted:
        raise RequestError("top_logprobs needs logprobs: true", "top_logprobs")
    return given | {"logprobs": 0 if top is None else top} if wanted else given
