"""Chat templates: Jinja programs that come with a checkpoint and write a conversation as one prompt.

They are somebody else's code, so they see nothing but plain JSON values, and run in Jinja's immutable sandbox
(`sandbox.py`) in a process that is stopped where they take too much time, memory or text (`renderer.py`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from jaxinfer.errors import RequestError, UnsupportedError
from jaxinfer.text import renderer
from jaxinfer.text.continuing import continued
from jaxinfer.text.files import one_line, read_json
from jaxinfer.text.messages import normalize_messages, plain
from jaxinfer.text.tools import Tool, tool_schema

__all__ = ["ChatTemplates", "Tool", "load_chat_templates"]

Result = TypeVar("Result")

# Options of transformers' apply_chat_template. A template would take them for variables and ignore them.
_NOT_VARIABLES = {
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
    """The chat templates of a checkpoint.

    folder: the checkpoint's.
    templates: by name.
    variables: the special tokens that they may write (`bos_token`, ...).
    """

    folder: Path
    templates: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Tool] | None = None,
        add_generation_prompt: bool | None = None,
        chat_template: str | None = None,
        continue_final_message: bool | str = False,
        **template_kwargs: Any,
    ) -> str:
        """The conversation as one prompt.

        messages                [{"role": "user", "content": "..."}, ...]; see `jaxinfer.text.messages`
        tools                   JSON schemas, or Python functions (see `jaxinfer.text.tools`)
        add_generation_prompt   whether the header of the answer follows; None: unless the last message is continued
        chat_template           a template, or the name of one of the checkpoint's; by default `tool_use` where there
                                are tools and the checkpoint has one, else `default`
        continue_final_message  the prompt ends inside the last message, where its content ends, or another of its
                                fields, such as "reasoning_content"
        template_kwargs         further variables of the template, such as `enable_thinking=False`

        Raises RequestError for malformed messages or tools, for a missing template, for whatever the template itself
        raises, and where it takes more time or memory than it may (see `jaxinfer.text.renderer`).
        """
        if wrong := sorted(_NOT_VARIABLES & template_kwargs.keys()):
            raise UnsupportedError.at(
                wrong[0], "not supported here; leave it out (other names reach the template as its variables)"
            )
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        elif add_generation_prompt and continue_final_message:
            raise RequestError(
                "add_generation_prompt and continue_final_message exclude each other: leave one out",
                "continue_final_message",
            )
        schemas = None
        if tools is not None:
            schemas = [plain(tool_schema(tool, f"tools[{i}]"), f"tools[{i}]") for i, tool in enumerate(tools)]
        source = self._select(chat_template, bool(schemas))
        values: dict[str, Any] = {
            "documents": None,
            **self.variables,
            **{name: plain(value, name) for name, value in template_kwargs.items()},
            "tools": schemas,
            "add_generation_prompt": add_generation_prompt,
        }

        def write(conversation: list[dict[str, Any]]) -> str:
            return self._in_one_line(renderer.render, source, values | {"messages": conversation})

        conversation = normalize_messages(messages, self._in_one_line(renderer.takes, source), self.folder)
        if not continue_final_message:
            return write(conversation)
        field = "content" if continue_final_message is True else continue_final_message
        return continued(conversation, field, write)

    def _in_one_line(self, work: Callable[..., Result], source: str, *arguments: Any) -> Result:
        """With errors that name the template."""
        names = [name for name, template in self.templates.items() if template == source]
        param = "messages" if names else "chat_template"
        try:
            return work(source, *arguments)
        except renderer.TemplateError as error:
            line = "" if error.line is None else f" line {error.line}"
            raise RequestError(f"chat template{line}: {one_line(error)}", param) from None
        except renderer.LimitError as error:
            which = f"{self.folder}: the chat template {names[0]!r}" if names else "chat_template"
            raise RequestError(f"{which} {error}; use another template", param) from None

    def _select(self, chosen: str | None, with_tools: bool) -> str:
        if chosen is not None:
            if isinstance(chosen, str) and (chosen in self.templates or any(x in chosen for x in ("{{", "{%", "{#"))):
                return self.templates.get(chosen, chosen)
            names = ", ".join(sorted(self.templates)) or "none"
            raise RequestError(
                f"chat_template is {chosen!r:.80}: neither the name of one of the checkpoint's ({names}) nor the text "
                "of one, with {{ or {% in it",
                "chat_template",
            )
        if not self.templates:
            raise UnsupportedError(
                f"{self.folder}: the checkpoint has no chat template; use generate with a plain prompt, or pass "
                "chat_template=",
                "chat_template",
            )
        if with_tools and "tool_use" in self.templates:
            return self.templates["tool_use"]
        if "default" not in self.templates:
            names = ", ".join(sorted(self.templates))
            raise UnsupportedError(
                f"{self.folder}: no default chat template; choose one of {names} with chat_template=", "chat_template"
            )
        return self.templates["default"]


def load_chat_templates(folder: Path, config: Mapping[str, Any], variables: dict[str, str]) -> ChatTemplates:
    """The templates in a checkpoint folder; none is not an error.

    Files win over tokenizer_config.json (`config`), as in transformers: `chat_template.jinja` is the default one and
    `additional_chat_templates/NAME.jinja` (or `chat_templates/`, an older name) the others. `chat_template.json`, which
    processors wrote, comes last.
    """
    templates: dict[str, str] = {}
    paths = {"default": folder / "chat_template.jinja"}
    for others in ("chat_templates", "additional_chat_templates"):
        paths |= {path.stem: path for path in sorted((folder / others).glob("*.jinja"))}
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
