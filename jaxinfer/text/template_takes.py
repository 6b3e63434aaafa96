"""Which forms of a message's fields a chat template is written for, read off its syntax tree.

Some templates print `content` as text, some loop over its typed parts, some do either; a list printed as text would be
Python's spelling of it, and text looped over would be single characters. vLLM decides in the same way
(`--chat-template-content-format auto`).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from jinja2 import nodes

__all__ = ["Takes", "template_takes"]

_KINDS = {"string", "mapping", "iterable", "sequence"}  # Jinja's tests that tell the forms apart


@dataclass(frozen=True)
class Takes:
    """What a template does with `content`, and with a tool call's arguments.

    text, parts: it takes text, or parts; both: what it finds.
    null: it asks whether it is null (DeepSeek's ask so whether there are tool calls).
    arguments_as_text: a tool call's arguments are text, and no object.
    """

    text: bool = True
    parts: bool = False
    null: bool = False
    arguments_as_text: bool = False


def template_takes(template: nodes.Template) -> Takes:
    """Reads a parsed template. What it says nothing of is text, and an object of arguments."""
    content, arguments = _Field(template, "content"), _Field(template, "arguments")
    loops = any(_reads_part(loop, loop.target) for loop in template.find_all(nodes.For) if content.is_in(loop.iter))
    # What looks at the first part alone may still print all of the content as text.
    indexed = any(
        isinstance(item, nodes.Getitem) and isinstance(item.arg, nodes.Const) and content.is_in(item.node)
        for access in _accesses(template, {"type", "text"})
        for item in [access.node]
    )
    return Takes(
        text=not loops or content.is_tested(_KINDS),
        parts=loops or indexed,
        null=content.is_tested({"none"}),
        arguments_as_text=arguments.is_printed() and not arguments.is_tested(_KINDS) and not arguments.is_an_object(),
    )


class _Field:
    """The expressions of a template that have a message's field as their value: the field itself, variables and
    arguments of macros that it is assigned to, and these through filters and slices. Scopes are not looked at."""

    def __init__(self, template: nodes.Template, key: str) -> None:
        self._template = template
        self._key = key
        self._names: set[str] = set()
        macros = {macro.name: macro for macro in template.find_all(nodes.Macro)}
        known = -1
        while known < len(self._names):
            known = len(self._names)
            for assign in template.find_all(nodes.Assign):
                self._bind(assign.target, assign.node)
            for call in template.find_all(nodes.Call):
                if isinstance(call.node, nodes.Name) and call.node.name in macros:
                    parameters = macros[call.node.name].args
                    for parameter, value in zip(parameters, call.args, strict=False):
                        self._bind(parameter, value)
                    for keyword in call.kwargs:
                        self._bind(nodes.Name(keyword.key, "param"), keyword.value)

    def _bind(self, target: nodes.Node, value: nodes.Node) -> None:
        if isinstance(target, nodes.Name) and self.is_in(value):
            self._names.add(target.name)

    def is_in(self, value: nodes.Node | None) -> bool:
        """Whether it is the expression's value, or can be."""
        if isinstance(value, nodes.Name):
            return value.name in self._names
        if isinstance(value, nodes.Filter) or (isinstance(value, nodes.Getitem) and isinstance(value.arg, nodes.Slice)):
            return self.is_in(value.node)
        if isinstance(value, nodes.CondExpr):
            return self.is_in(value.expr1) or self.is_in(value.expr2)
        if isinstance(value, nodes.And | nodes.Or):
            return self.is_in(value.left) or self.is_in(value.right)
        return _key(value) == self._key

    def is_tested(self, names: set[str]) -> bool:
        return any(test.name in names and self.is_in(test.node) for test in self._template.find_all(nodes.Test))

    def is_printed(self) -> bool:
        """Whether it is written or joined to text as it is, without a filter."""
        bare: list[nodes.Node] = [node for output in self._template.find_all(nodes.Output) for node in output.nodes]
        bare += [side for add in self._template.find_all(nodes.Add) for side in (add.left, add.right)]
        bare += [node for concat in self._template.find_all(nodes.Concat) for node in concat.nodes]
        return any(self.is_in(node) for node in bare if not isinstance(node, nodes.Filter))

    def is_an_object(self) -> bool:
        """Whether something is done with it that only makes sense with an object."""
        uses: list[nodes.Node | None] = [
            node.node for node in self._template.find_all(nodes.Filter) if node.name in ("tojson", "items", "dictsort")
        ]
        uses += [node.node for node in self._template.find_all(nodes.Getattr) if node.attr in ("items", "keys", "get")]
        uses += [loop.iter for loop in self._template.find_all(nodes.For)]
        return any(self.is_in(node) for node in uses)


def _key(value: nodes.Node | None) -> object:
    """What `x.key` and `x["key"]` ask for."""
    if isinstance(value, nodes.Getattr):
        return value.attr
    if isinstance(value, nodes.Getitem) and isinstance(value.arg, nodes.Const):
        return value.arg.value
    return None


def _accesses(tree: nodes.Node, keys: set[str]) -> Iterator[nodes.Getattr | nodes.Getitem]:
    for access in tree.find_all((nodes.Getattr, nodes.Getitem)):
        if isinstance(access, nodes.Getattr | nodes.Getitem) and _key(access) in keys:
            yield access


def _reads_part(loop: nodes.For, target: nodes.Node) -> bool:
    """Whether a loop's variable is used as a typed part is, or handed on to a macro."""
    if not isinstance(target, nodes.Name):
        return False
    used = [access.node for access in _accesses(loop, {"type", "text"})]
    used += [value for call in loop.find_all(nodes.Call) for value in call.args]
    return any(isinstance(node, nodes.Name) and node.name == target.name for node in used)
