"""From a record to a row: which of the forms it has, and whether it makes sense."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, get_args

from jaxinfer.batch import openai_request as request
from jaxinfer.batch.fields import FORMS, decoded, own_params, text, token_ids, tools
from jaxinfer.batch.row import POOLING, Ask, Record, Row, Task
from jaxinfer.batch.template import PromptTemplate
from jaxinfer.batch.values import json_value, parse_json, printable
from jaxinfer.openai.fields import kind
from jaxinfer.openai.requests import conversation
from jaxinfer.sampling.params import SamplingParams
from jaxinfer.text.files import one_line

# What rows of a task have besides one of FORMS, or in its place.
COLUMNS = {"score": ("continuation",), "classify": ("text_pair",), "rerank": ("query", "documents")}


class Parser:
    """Understands the records of one job.

    A row has one of `prompt`, `messages`, `text` and `prompt_token_ids`, or what `prompt_template` makes of its
    columns; then these names are columns like any other.

        generate   prompt or text, prompt_token_ids
        chat       messages, with `tools` if it has some; prompt or text: what the user says
        score      text or prompt_token_ids, as a whole; or `continuation`, given prompt, which may be empty
        embed      text, prompt or prompt_token_ids
        classify   the same, or a pair of texts: text (or prompt) and `text_pair`
        rerank     `query`, and `documents`, a list of texts

    Sampling parameters of its own are under `params` or `sampling_params`, by the names of SamplingParams; null is not
    given. `adapter` is the name of one beside the weights, for rows that make or score text; null is none. With a
    prompt template it is a column like any other where there are no adapters. A column that only happens to be called
    like a parameter (`seed`, `n`) is none. Where a file can't have lists and objects, they may be there as JSON in
    text. OpenAI batch lines (`jaxinfer.batch.openai_request`) may be among the rows of generate and chat, where each
    one's url decides which it is, and of embed; their model may be an adapter.

    defaults: the parameters of rows, before `options`.
    options: those that the job's user asked for. For OpenAI lines they change OpenAI's defaults instead.
    adapters: the names of those there are. adapter: of rows that say nothing of it.
    model: the names of the model itself; where there are adapters OpenAI lines name it or one of them.

    Raises ValueError for a template or an option that is no good.
    """

    def __init__(
        self,
        task: Task,
        defaults: SamplingParams,
        options: Mapping[str, Any] | None = None,
        prompt_template: str | None = None,
        adapters: Collection[str] = (),
        adapter: str | None = None,
        model: Collection[str] = (),
    ):
        if task not in get_args(Task):
            raise ValueError(f"task is {task!r}: it must be one of {', '.join(get_args(Task))}")
        if task in POOLING and options:
            raise ValueError(f"{next(iter(options))}: nothing is sampled by the task {task}; leave it out")
        if task == "rerank" and prompt_template is not None:
            raise ValueError("a prompt template makes one text, and rerank needs a query and documents; leave it out")
        self.task, self._adapters, self._adapter, self._model = task, adapters, adapter, model
        self._options = dict(options or {})
        self._params = defaults.with_changes(**self._options)
        self._template = None if prompt_template is None else PromptTemplate(prompt_template)

    @property
    def template_columns(self) -> set[str]:
        """The columns that the prompt template takes."""
        return set() if self._template is None else self._template.columns

    def parse(self, record: Record) -> Row:
        """The row. Nothing is raised: one that is no good has an `error`."""
        columns: dict[str, Any] = {}
        problems: list[str] = []
        batch_line, custom_id = False, None
        try:
            columns = self._columns(record, problems)
            batch_line = self._template is None and request.is_batch_line(columns)
            if batch_line:
                line, columns = columns, {}
                custom_id = request.custom_id(line)
            if problems:
                raise ValueError(problems[0])
            ask = request.ask(line, self.task, self._options, self._of_model) if batch_line else self._ask(columns)
            return Row(record.index, record.where, columns, ask, None, batch_line, custom_id, record.origin)
        except (ValueError, OverflowError) as error:  # integers in JSON have no limit
            problem = printable(f"{record.where}: {one_line(error)}")
            return Row(record.index, record.where, columns, None, problem, batch_line, custom_id, record.origin)

    def _columns(self, record: Record, problems: list[str]) -> dict[str, Any]:
        if record.error is not None:
            raise ValueError(record.error)
        value = parse_json(record.value) if isinstance(record.value, bytes) else record.value
        if not isinstance(value, dict):
            raise ValueError(f'a row must be an object such as {{"prompt": ...}}, and is {kind(value)}')
        used = {*FORMS, *COLUMNS.get(self.task, ())} if self._template is None else self._template.columns
        columns: dict[str, Any] = {}
        for name, item in value.items():
            faults: list[str] = ["binary, not text"] if isinstance(item, bytes) and name in used else []
            columns[json_value(name, faults)] = json_value(item, faults)
            problems += [f"{name!r:.80} is {problem}" for problem in faults]
        return columns

    def _ask(self, row: dict[str, Any]) -> Ask:
        if self.task == "rerank":
            return _rerank(row)
        form, prompt = self._prompt(row)
        if self.task == "score":
            return replace(_score(row, form, prompt, self._template is not None), adapter=self._named(row))
        second = row.get("text_pair") if self.task == "classify" and self._template is None else None
        if not prompt and not second:
            raise ValueError(f"{form} is empty")
        if self.task in POOLING:
            return _text(row, form, prompt, second)
        own = own_params(row)
        params = self._params.with_changes(**own) if own else self._params
        if self.task == "generate":
            if form == "messages":
                raise ValueError("messages are for the task chat, and this is generate")
            return Ask(prompt=prompt, params=params, adapter=self._named(row))
        if form == "prompt_token_ids":
            raise ValueError("prompt_token_ids have no chat template: they are for the task generate, and this is chat")
        messages = prompt if form == "messages" else [{"role": "user", "content": prompt}]
        return Ask(messages=messages, tools=tools(row), params=params, adapter=self._named(row))

    def _named(self, row: dict[str, Any]) -> str | None:
        """The adapter that a row has."""
        if "adapter" not in row or (self._template is not None and not self._adapters):
            return self._adapter
        name = row["adapter"]
        if name in (None, "") or text("adapter", name) in self._adapters:
            return name or None
        there = ", ".join(sorted(self._adapters)) or "none; they are loaded with the model"
        raise ValueError(f"adapter is {name!r:.80}: there are {there}")

    def _of_model(self, model: object) -> str | None:
        """The adapter of an OpenAI line."""
        if not self._adapters or model is None:
            return self._adapter
        if isinstance(model, str) and model in self._adapters:
            return model
        if model in self._model:
            return None
        there = ", ".join(sorted((*self._adapters, *self._model)))
        raise ValueError(f"body: model is {model!r:.80}: there are {there}")

    def _prompt(self, row: dict[str, Any]) -> tuple[str, Any]:
        """The form of the row's prompt, and the prompt."""
        if self._template is not None:
            return "prompt", self._template.fill(row)
        forms = [form for form in FORMS if row.get(form) is not None]
        if len(forms) > 1:  # in CSV, a column that a row does not have is empty
            forms = [form for form in forms if row[form] != ""] or forms[:1]
        if len(forms) > 1:
            raise ValueError(f"has both {forms[0]} and {forms[1]}: leave one out, or use a prompt template")
        if not forms:
            there = ", ".join(map(repr, row)) or "nothing"
            raise ValueError(f"has none of {', '.join(FORMS)}, and no prompt template was given; has {there}")
        form = forms[0]
        if form == "messages":
            return form, conversation(decoded(row, form))
        if form == "prompt_token_ids":
            return form, token_ids(form, decoded(row, form))
        return form, text(form, row[form])


def _text(row: dict[str, Any], form: str, prompt: Any, second: Any) -> Ask:
    """To embed or to classify. second: of a pair; as CSV has it in rows without one it may be empty."""
    if form == "messages":
        raise ValueError("messages are for the task chat: give text")
    _check_unsampled(row)
    if second in (None, ""):
        return Ask(texts=(prompt,))
    if form == "prompt_token_ids":
        raise ValueError("has both prompt_token_ids and text_pair: a pair is of two texts")
    return Ask(texts=((prompt, text("text_pair", second)),))


def _rerank(row: dict[str, Any]) -> Ask:
    _check_unsampled(row)
    query, documents = text("query", row.get("query")), decoded(row, "documents")
    if not query:
        raise ValueError("query is empty")
    if not isinstance(documents, list) or not documents:
        raise ValueError(
            f"documents must be a list of texts, and is {kind(documents)}{' without any' * (documents == [])}"
        )
    return Ask(query=query, texts=tuple(text(f"documents[{i}]", document) for i, document in enumerate(documents)))


def _check_unsampled(row: dict[str, Any]) -> None:
    if own_params(row):
        raise ValueError("sampling parameters are for what is generated, and nothing is here: leave params out")


def _score(row: dict[str, Any], form: str, prompt: Any, templated: bool) -> Ask:
    if form == "messages":
        raise ValueError("messages can't be scored: score text, or a continuation of a prompt")
    _check_unsampled(row)
    continuation = row.get("continuation")
    if continuation is None or (continuation == "" and form != "prompt"):  # as CSV has it in rows without one
        if form == "prompt" and not templated:
            raise ValueError("prompt without continuation: say text instead to score it as a whole")
        if not prompt:
            raise ValueError(f"{form} is empty")
        return Ask(prompt=prompt)
    if form != "prompt":
        raise ValueError(f"has both {form} and continuation: a continuation follows a prompt")
    if not text("continuation", continuation):
        raise ValueError("continuation is empty")
    return Ask(prompt=prompt, continuation=continuation)
