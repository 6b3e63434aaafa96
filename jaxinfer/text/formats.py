"""How families of models write calls of tools and reasoning: tables for `jaxinfer.text.scanner`, and which one a chat
template is for. Names are vLLM's (`--tool-call-parser`, `--reasoning-parser`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from jaxinfer.text import calls
from jaxinfer.text.scanner import Format, Section, Written
from jaxinfer.text.strict import function_call, json_call

__all__ = [
    "HARMONY",
    "REASONING",
    "TOOLS",
    "enforced",
    "message_format",
    "opened_by",
    "reasoning_of",
    "shows_special",
    "tools_of",
]

_CALLS, _END_OF_CALLS = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"


def _ends_in_json(body: str) -> bool:
    return not calls.in_string(body)


def _between(
    opens: str, closes: str, parse: calls.Parse, end: str | None = None, written: Written | None = None
) -> Section:
    """end: what stands before the closing marker, which may be in a value, too; None: JSON."""

    def ends(body: str) -> bool:
        return _ends_in_json(body) if end is None else body.rstrip().endswith(end)

    return Section("call", opens, (closes,), parse, ends, written=written)


def _to_the_end(opens: str, parse: calls.Parse, bare: bool = False) -> Section:
    return Section("call", opens, (), parse, bare=bare)


def _key_values_end(body: str) -> bool:
    return "<arg_key>" not in body or body.rstrip().endswith("</arg_value>")


HARMONY = (
    Section("reasoning", "<|channel|>analysis<|message|>", ("<|end|>",)),
    Section("call", "<|channel|>commentary to=", ("<|call|>", "<|end|>"), calls.harmony_calls, _ends_in_json),
    Section("call", "<|start|>assistant to=", ("<|call|>", "<|end|>"), calls.harmony_calls, _ends_in_json),
    *(
        Section("content", marker)
        for marker in (
            "<|channel|>commentary<|message|>",
            "<|channel|>final<|message|>",
            "<|start|>assistant",
            "<|end|>",
            "<|return|>",
            "<|call|>",
        )
    ),
)

TOOLS: dict[str, tuple[Section, ...]] = {
    "hermes": (_between("<tool_call>", "</tool_call>", calls.json_calls, written=json_call),),
    "qwen3_coder": (
        _between("<tool_call>", "</tool_call>", calls.function_calls, "</function>", written=function_call),
    ),
    "glm45": (Section("call", "<tool_call>", ("</tool_call>",), calls.key_value_calls, _key_values_end),),
    "minimax_m2": (_between("<minimax:tool_call>", "</minimax:tool_call>", calls.invoke_calls, "</invoke>"),),
    "llama3_json": (
        _to_the_end("<|python_tag|>", calls.json_calls),
        _to_the_end("{", calls.json_calls, bare=True),
    ),
    "pythonic": (
        Section("call", "<|python_start|>", ("<|python_end|>",), calls.python_calls),
        _to_the_end("[", calls.python_calls, bare=True),
    ),
    "mistral": (_to_the_end("[TOOL_CALLS]", calls.mistral_calls),),
    "deepseek_v3": (_between(_CALLS, _END_OF_CALLS, calls.deepseek_calls),),
    "granite": (_to_the_end("<|tool_call|>", calls.json_calls),),
    "kimi_k2": (_between("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", calls.kimi_calls),),
    "openai": HARMONY,
}
REASONING: dict[str, tuple[Section, ...]] = {
    "think": (Section("reasoning", "<think>", ("</think>",)),),
    "mistral": (Section("reasoning", "[THINK]", ("[/THINK]",)),),
    "openai": HARMONY,
}
# What a template has in it, first the surest.
_TOOLS_IN_TEMPLATES = (
    ("<|channel|>", "openai"),
    ("<｜tool▁calls▁begin｜>", "deepseek_v3"),
    ("<|tool_calls_section_begin|>", "kimi_k2"),
    ("<minimax:tool_call>", "minimax_m2"),
    ("<arg_key>", "glm45"),
    ("<function=", "qwen3_coder"),
    ("[TOOL_CALLS]", "mistral"),
    ("<|tool_call|>", "granite"),
    ("<tool_call>", "hermes"),
    ("func_name1(params_name1=", "pythonic"),
    ("<|python_tag|>", "llama3_json"),
    ('"parameters": dictionary of argument name', "llama3_json"),
)
_REASONING_IN_TEMPLATES = (
    ("<|channel|>", "openai"),
    ("[THINK]", "mistral"),
    ("</think>", "think"),
    ("<think>", "think"),
)


def tools_of(template: str) -> str | None:
    """The name of how a template's model writes calls; None if it does not show."""
    return next((name for sign, name in _TOOLS_IN_TEMPLATES if sign in template), None)


def reasoning_of(template: str) -> str | None:
    """The same of reasoning."""
    return next((name for sign, name in _REASONING_IN_TEMPLATES if sign in template), None)


def message_format(tools: str | None, reasoning: str | None, special: Collection[str] = ()) -> Format:
    """What a model writes. special: its special tokens, which are no part of a message where they mean nothing."""
    sections = dict.fromkeys((*TOOLS.get(tools or "", ()), *REASONING.get(reasoning or "", ())))
    known = " ".join(marker for section in sections for marker in (section.opens, *section.closes))
    others = [Section("content", token) for token in special if token and token not in known]
    return Format((*sections, *others), id_digits=9 if tools == "mistral" else 0)


def enforced(form: Format) -> Format:
    """The same with calls as a grammar has them, whatever the model would write: a list in JSON."""
    others = [section for section in form.sections if section.kind != "call"]
    return dataclasses.replace(form, sections=(_to_the_end("[", calls.begun_calls, bare=True), *others))


def shows_special(form: Format, special: Collection[str]) -> bool:
    """Whether special tokens are among the markers, so that they must be in the text."""
    markers = [marker for section in form.sections for marker in (section.opens, *section.closes)]
    return any(token and token in marker for token in special for marker in markers)


def opened_by(form: Format, prompt: str) -> str | None:
    """The marker of the section that a prompt ends in."""
    end = prompt.rstrip()
    reasoning = [section.opens for section in form.sections if section.kind == "reasoning"]
    return next((marker for marker in reasoning if end.endswith(marker)), None)
