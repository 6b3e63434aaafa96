"""Prompt templates: what is filled in, and what is not looked into."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.batch.template import PromptTemplate
from tests.refusals import line


def test_columns_are_filled_in():
    template = PromptTemplate("{{Q}}: {question} ({my column}, {ids}, {ok}) {question}")
    assert template.columns == {"question", "my column", "ids", "ok"}
    row = {"question": "a {b} é", "my column": 1.5, "ids": [1, {"a": "é"}], "ok": True, "other": None}
    assert template.fill(row) == '{Q}: a {b} é (1.5, [1, {"a": "é"}], true) a {b} é'


@pytest.mark.parametrize(
    "template",
    [
        "{a.b}",
        "{a.__class__.__mro__}",
        "{a[0]}",
        "{a!r}",
        "{a:>10}",
        "{a:{b}}",
        "{a!r:}",
        "{}",
        "{0}",
        "{ }",
        "{a",
        "a}",
        "{a}}",
        "{{a}}",
        "",
        "no column",
        "{a!}",
        "{a[}",
    ],
)
def test_anything_else_is_refused(template):
    problem = line(lambda: PromptTemplate(template))
    assert repr(template) in problem


def test_a_column_that_is_not_there_or_null():
    template = PromptTemplate("{a} {b}")
    assert "'b'" in line(lambda: template.fill({"a": 1, "c": 2}))
    assert "'c'" in line(lambda: template.fill({"a": 1, "c": 2}))
    assert "'b' of the prompt template is null" in line(lambda: template.fill({"a": 1, "b": None}))


names = st.text(string.ascii_letters + "_ -é", min_size=1).filter(str.strip)


@given(st.lists(st.tuples(st.text(), names)), st.data())
def test_as_str_format_does_it(parts, data):
    """Text of any kind, as template and as value."""
    source = "".join(text.replace("{", "{{").replace("}", "}}") + f"{{{name}}}" for text, name in parts) + "{x}"
    row = {name: data.draw(st.text()) for _, name in parts} | {"x": "x"}
    assert PromptTemplate(source).fill(row) == source.format_map(row)
