"""Chat templates: Jinja programs that come with a checkpoint and write a conversation as one prompt.

They are somebody else's code, so they see nothing but plain JSON values, and run in Jinja's immutable sandbox
(`sandbox.py`) in a process that is stopped where they take too much time, memory or text (`renderer.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxinfer.text import renderer
from jaxinfer.text.files import one_line, read_json
from jaxinfer.text.tools import Tool, tool_schema

__all__ = ["ChatTemplates", "Tool", "check_messages", "load_chat_templates"]

# Options of transformers' apply_chat_template. A template would take them for variables and ignore them.
_NOT_VARIABLES = {
    "continue_final_message",
    "max_length",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "tokenize",
    "tokenizer_kwargs",
    "truncation",
}


@dataclass(frozen=True)
class ChatTemplates:
    """The chat templates of a checkpoint by name, and the special tokens that they may write (`bos_token`, ...)."""

    folder: Path
    templates: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Tool] | None = None,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        **template_kwargs: Any,
    ) -> str:
        """The conversation as one prompt.

        messages         [{"role": "user", "content": "..."}, ...]
        tools            JSON schemas, or Python functions (see `jaxinfer.text.tools`)
        chat_template    a template, or the name of one of the checkpoint's; by default `tool_use` where there are
                         tools and the checkpoint has one, else `default`
        template_kwargs  further variables of the template, such as `enable_thinking=False`

        Raises ValueError for malformed messages or tools, for a missing template, for whatever the template itself
        raises, and where it takes more time or memory than it may (see `jaxinfer.text.renderer`).
        """
        if wrong := sorted(_NOT_VARIABLES & template_kwargs.keys()):
            raise ValueError(
                f"{wrong[0]}: not supported here; leave it out (other names reach the template as its variables)"
            )
        check_messages(messages)
        schemas = None
        if tools is not None:
            schemas = [_plain(tool_schema(tool, f"tools[{i}]"), f"tools[{i}]") for i, tool in enumerate(tools)]
        source = self._select(chat_template, bool(schemas))
        variables = {name: _plain(value, name) for name, value in template_kwargs.items()}
        values: dict[str, Any] = {
            "documents": None,
            **self.variables,
            **variables,
            "messages": [_plain(message, f"messages[{i}]") for i, message in enumerate(messages)],
            "tools": schemas,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return renderer.render(source, values)
        except renderer.TemplateError as error:
            line = "" if error.line is None else f" line {error.line}"
            raise ValueError(f"chat template{line}: {one_line(error)}") from None
        except renderer.LimitError as error:
            names = [name for name, one in self.templates.items() if one == source]
            which = f"{self.folder}: the chat template {names[0]!r}" if names else "chat_template"
            raise ValueError(f"{which} {error}; use another template") from None

    def _select(self, chosen: str | None, with_tools: bool) -> str:
        if chosen is not None:
            return self.templates.get(chosen, chosen)
        if not self.templates:
            raise ValueError(
                f"{self.folder}: the checkpoint has no chat template; use generate with a plain prompt, or pass "
                "chat_template="
            )
        if with_tools and "tool_use" in self.templates:
            return self.templates["tool_use"]
        if "default" not in self.templates:
            names = ", ".join(sorted(self.templates))
            raise ValueError(f"{self.folder}: no default chat template; choose one of {names} with chat_template=")
        return self.templates["default"]


def load_chat_templates(folder: Path, config: Mapping[str, Any], variables: dict[str, str]) -> ChatTemplates:
    """The templates in a checkpoint folder; none is not an error.

    Files win over tokenizer_config.json (`config`), as in transformers: `chat_template.jinja` is the default one and
    `chat_templates/NAME.jinja` the others. `chat_template.json`, which processors wrote, comes last.
    """
    templates: dict[str, str] = {}
    paths = {"default": folder / "chat_template.jinja"}
    paths |= {path.stem: path for path in sorted((folder / "chat_templates").glob("*.jinja"))}
    for name, path in paths.items():
        if path.is_file():
            try:
                templates[name] = path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: not UTF-8 ({one_line(error)}); download the file again") from None
    if not templates:
        where = folder / "tokenizer_config.json"
        declared = config.get("chat_template")
        if declared is None:
            where = folder / "chat_template.json"
            declared = read_json(where).get("chat_template")
        templates = _declared(declared, where)
    return ChatTemplates(folder, templates, variables)


def _declared(value: object, where: Path) -> dict[str, str]:
    """A template in JSON is one string, {name: template}, or [{"name": ..., "template": ...}, ...]."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list) and all(
        isinstance(item, dict) and {"name", "template"} <= item.keys() for item in value
    ):
        value = {item["name"]: item["template"] for item in value}
    if not isinstance(value, dict) or not all(isinstance(x, str) for pair in value.items() for x in pair):
        raise ValueError(f"{where}: chat_template must be a string or a list of name and template, found {value!r:.80}")
    return value


def check_messages(messages: object) -> None:
    """Raises ValueError unless `messages` is a non-empty list of {"role": str, "content": str, parts or None}."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        kind = type(messages).__name__
        raise ValueError(f'messages: expected a list such as [{{"role": "user", "content": "..."}}], found {kind}')
    if not messages:
        raise ValueError('messages: the list is empty; start with {"role": "user", "content": "..."}')
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f"messages[{i}]: expected a dict with role and content, found {type(message).__name__}")
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise ValueError(f"messages[{i}]: role must be a string such as 'user' or 'assistant', found {role!r:.80}")
        content = message.get("content")
        if content is None and ("content" in message or "tool_calls" in message):
            continue
        if isinstance(content, str):
            continue
        if not isinstance(content, Sequence) or not all(isinstance(p, Mapping) and "type" in p for p in content):
            found = "nothing" if content is None else f"{content!r:.80}"
            raise ValueError(f"messages[{i}]: content must be a string or a list of typed parts, found {found}")


def _plain(value: Any, where: str) -> Any:
    """A copy out of plain JSON types: methods of richer objects are not for a template to call."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise ValueError(f"{where}: keys must be strings, found {wrong[0]!r:.80}")
        return {str.__str__(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise ValueError(f"{where}: a chat template takes plain JSON values, found {type(value).__name__}")
