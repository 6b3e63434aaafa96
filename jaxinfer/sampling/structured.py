"""What a text must look like: JSON, a regular expression, one of several choices, a grammar. Names are vLLM's."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxinfer.errors import RequestError
from jaxinfer.json_schema import MAX_BYTES, check_size, closed

PARAM = "structured_outputs"
PATTERNS = {"regex", "whitespace_pattern"}
MAX_PATTERN = 2**13  # bytes: what is longer takes too long to understand
KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """What an output must match. Exactly one of the first six is given.

    json: a JSON schema: a dict, JSON in a string, True, or a class with pydantic's `model_json_schema`. Kept as JSON.
    regex: a regular expression that the whole output matches, in the syntax of Rust's regex crate: no look-around, no
        backreferences.
    choice: the output is one of these texts.
    grammar: in Lark's syntax as llguidance has it (with a rule `start`), GBNF or EBNF (with a rule `root ::=`).
    json_object: True: any JSON object.
    structural_tag: free text, in which what follows a trigger must match: {"type": "structural_tag", "triggers": [...],
        "structures": [{"begin": ..., "schema": {...}, "end": ...}]}, or the same as JSON. Kept as JSON.
    whitespace_pattern: what may stand between the parts of JSON, also in structural tags, besides nothing. None: a
        space, or a line's end and up to 32 spaces or tabs, so that no text ends in an endless row of them.
    disable_any_whitespace: JSON without any.
    disable_additional_properties: objects of which the schema names properties have no others, where it does not say.

    after: what comes before is free, up to and with this text or special token: "</think>", for models that reason
        first.
    unless: a text that begins with one of these texts or special tokens is free: a call of a tool, in place of an
        answer.
    asked_as: what errors call it, where a request has another name for it: "response_format", or
        "tools[].function.parameters" for schemas of tools. vLLM has nothing like these three.

    Raises RequestError naming the field.
    """

    json: str | bool | Mapping[str, Any] | type | None = None
    regex: str | None = None
    choice: Iterable[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | Mapping[str, Any] | None = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool | None = False
    disable_additional_properties: bool | None = False
    after: str | None = None
    unless: Iterable[str] | None = None
    asked_as: str = dataclasses.field(default=PARAM, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.asked_as, str) or not self.asked_as:
            raise RequestError(f"{PARAM}.asked_as must be a text that is not empty", PARAM)
        for name in ("json_object", "disable_any_whitespace", "disable_additional_properties"):
            if not isinstance(getattr(self, name), bool | None):
                raise self._error(name, "it must be True or False")
        object.__setattr__(self, "json_object", self.json_object or None)  # False asks for nothing
        there = [name for name in KINDS if getattr(self, name) is not None]
        if len(there) != 1:
            kinds = " and ".join(there) or "none of its kinds"
            raise self.refusal(f"{self.place()} has {kinds}: give exactly one of {', '.join(KINDS)}")
        for name in ("regex", "grammar", "whitespace_pattern", "after"):
            self._check_text(name)
        for name in ("json", "structural_tag"):
            object.__setattr__(self, name, self._as_json(name))
        for name in ("choice", "unless"):
            self._check_texts(name)
        if self.kind not in ("json", "json_object", "structural_tag"):
            for name in ("whitespace_pattern", "disable_any_whitespace", "disable_additional_properties"):
                if getattr(self, name):
                    raise self._error(name, "it is for json, json_object and structural_tag")
        if self.whitespace_pattern is not None and self.disable_any_whitespace:
            raise self._error("whitespace_pattern", "there is disable_any_whitespace too: leave one out")

    @staticmethod
    def of(value: Any) -> StructuredOutputsParams:
        """Itself, or what a mapping of its fields says. Raises RequestError."""
        if isinstance(value, StructuredOutputsParams):
            return value
        if not isinstance(value, Mapping):
            raise RequestError(
                f"sampling parameter {PARAM} is a {type(value).__name__}: it must be StructuredOutputsParams, or a "
                "dict of its fields",
                PARAM,
            )
        known = [field.name for field in dataclasses.fields(StructuredOutputsParams)]
        if strange := [name for name in value if name not in known]:
            raise RequestError(f"{PARAM} has no {strange[0]!r:.60}; there are {', '.join(known)}", PARAM)
        return StructuredOutputsParams(**value)

    @property
    def kind(self) -> str:
        """Which of the six it is."""
        return next(name for name in KINDS if getattr(self, name) is not None)

    def place(self, name: str = "", tool: int | None = None) -> str:
        """What errors call it, a field of it, or the schema of one of the tools that it is for."""
        if self.asked_as == PARAM:
            return f"{PARAM}.{name}" if name else PARAM
        return self.asked_as.partition("[]")[0] if tool is None else self.asked_as.replace("[]", f"[{tool}]")

    def refusal(self, text: str) -> RequestError:
        """One whose param is the field of the request."""
        return RequestError(text, re.split(r"\W", self.asked_as, maxsplit=1)[0])

    def _error(self, name: str, problem: str) -> RequestError:
        return self.refusal(f"{self.place(name)} is {getattr(self, name)!r:.100}: {problem}")

    def _check_text(self, name: str) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if not isinstance(value, str) or not value:
            raise self._error(name, "it must be a text that is not empty")
        self._check_length(name, value)

    def _check_length(self, name: str, text: str) -> None:
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            raise self._error(name, "it has half a surrogate pair, which no text has") from None
        most = MAX_PATTERN if name in PATTERNS else MAX_BYTES
        if size > most:
            raise self.refusal(f"{self.place(name)} has {size} bytes: at most {most} are supported")

    def _as_json(self, name: str) -> str | None:
        value = getattr(self, name)
        if value is None:
            return None
        if hasattr(value, "model_json_schema"):
            value = value.model_json_schema()
        try:
            if isinstance(value, str):
                self._check_length(name, value)
                value = json.loads(value)
            if not isinstance(value, Mapping) and not (name == "json" and isinstance(value, bool)):
                raise self._error(name, "it must be an object, as a dict or as JSON")
            try:
                check_size([value])
            except ValueError as error:
                raise self.refusal(f"{self.place(name)}: {error}") from None
            if name == "json" and self.disable_additional_properties:
                value = closed(value)
            text = json.dumps(value, ensure_ascii=False)
        except RecursionError:
            raise self.refusal(f"{self.place(name)} is nested too deeply") from None
        except RequestError:
            raise
        except (TypeError, ValueError) as error:
            raise self._error(name, f"it is no JSON: {error}") from None
        self._check_length(name, text)
        return text

    def _check_texts(self, name: str) -> None:
        value = getattr(self, name)
        if value is None:
            return
        texts = [] if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable) else list(value)
        if not texts or not all(isinstance(text, str) and text for text in texts):
            raise self._error(name, "it must be a list of texts, at least one, none of them empty")
        self._check_length(name, "".join(texts))
        object.__setattr__(self, name, tuple(dict.fromkeys(texts)))
