"""The fields of a request's body, each taken once and checked; what is left over is refused."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from jaxinfer.aliases import sampling as aliases
from jaxinfer.errors import RequestError, UnsupportedError
from jaxinfer.sampling.ids import is_id
from jaxinfer.sampling.params import SamplingParams

# What an answer would have no place for, or would be without.
SAMPLING = {field.name for field in dataclasses.fields(SamplingParams)} - {"prompt_logprobs", "detokenize"}
# vLLM's and OpenAI's names of structured_outputs.
SAMPLING |= {"response_format", *(name for name in aliases.SAMPLING.made if name.startswith("guided"))}


class Fields:
    """The members of an object that are not null. All methods raise RequestError, whose param is the field."""

    def __init__(self, body: Any, where: str = ""):
        if not isinstance(body, Mapping):
            raise RequestError(f"{where or 'the body'} must be an object, and is {kind(body)}", where or None)
        self._rest = {name: value for name, value in body.items() if value is not None}
        self._where = where

    def __contains__(self, name: str) -> bool:
        return name in self._rest

    def take(self, name: str, default: Any = None) -> Any:
        """Whatever it is."""
        return self._rest.pop(name, default)

    def skip(self, names: Iterable[str]) -> None:
        """Takes fields that say nothing about the answer."""
        for name in names:
            self._rest.pop(name, None)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise self.error(name, f"must be true or false, and is {shown(value)}")
        return value

    def text(self, name: str, default: str | None = None) -> str | None:
        value = self.take(name, default)
        if value is not None and not isinstance(value, str):
            raise self.error(name, f"must be text, and is {kind(value)}")
        return value

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int | None:
        value = self.take(name, default)
        if value is None or (isinstance(value, int) and not isinstance(value, bool) and low <= value <= high):
            return value
        raise self.error(name, f"must be an integer from {low} to {high}, and is {shown(value)}")

    def prompts(self, name: str) -> list[str | list[int]]:
        """One prompt or several, as text or token ids."""
        return prompts(name, self.take(name))

    def texts(self, name: str) -> list[str]:
        """One text or several."""
        return texts(name, self.take(name))

    def choice(self, name: str, choices: tuple[str, ...], default: str) -> str:
        value = self.take(name, default)
        if value not in choices:
            raise self.error(name, f"must be one of {', '.join(choices)}, and is {shown(value)}")
        return str(value)

    def only(self, name: str, *values: Any, remedy: str = "leave it out") -> None:
        """Takes a field that may have these values alone, which ask for nothing."""
        if name in self._rest and (value := self.take(name)) not in values:
            raise UnsupportedError(f"{self._at(name)} is {shown(value)}, which is not supported; {remedy}", name)

    def inner(self, name: str) -> Fields | None:
        """The members of a field that is an object."""
        return Fields(self.take(name), self._at(name)) if name in self._rest else None

    def sampling(self) -> dict[str, Any]:
        """Takes all that SamplingParams has, with the token ids of logit_bias as integers."""
        taken = {name: self._rest.pop(name) for name in list(self._rest) if name in SAMPLING}
        structured = taken.get("structured_outputs")
        if isinstance(structured, Mapping) and "asked_as" in structured:  # it is for what other fields become
            raise UnsupportedError("structured_outputs.asked_as is not supported; leave it out", "structured_outputs")
        return with_int_bias(taken)

    def refuse(self, name: str, taken: Mapping[str, Any]) -> None:
        """One of those that were taken, which is not of this kind of request."""
        if name in taken:
            raise UnsupportedError(f"{self._at(name)!r} is not supported here; leave it out", name)

    def end(self) -> None:
        """Refuses what is left."""
        for name in self._rest:
            raise UnsupportedError(f"{self._at(name)!r:.80} is not supported; leave it out", name[:80])

    def error(self, name: str, problem: str) -> RequestError:
        return RequestError(f"{self._at(name)} {problem}", name)

    def _at(self, name: str) -> str:
        return f"{self._where}.{name}" if self._where else name


def kind(value: Any) -> str:
    """What a value is, in JSON's words."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), "null")


def shown(value: Any) -> str:
    """A value in an error."""
    return f"{value!r:.40}" if not isinstance(value, dict | list) else kind(value)


def changed(params: SamplingParams, changes: Mapping[str, Any], **spelled: str) -> SamplingParams:
    """With these changes. spelled: the request's own names of some parameters, which errors have."""
    try:
        return params.with_changes(**changes)
    except RequestError as error:
        if error.param not in spelled:
            raise
        name = spelled[error.param]
        raise type(error)(re.sub(rf"\b{error.param}\b", name, str(error), count=1), name) from None


def with_int_bias(params: dict[str, Any]) -> dict[str, Any]:
    """With the token ids of logit_bias as integers: keys in JSON are text. What is no integer is left for
    SamplingParams to refuse."""
    bias = params.get("logit_bias")
    if isinstance(bias, dict):
        ids = {int(key) if key.isascii() and key.isdecimal() and len(key) < 20 else key: v for key, v in bias.items()}
        params = params | {"logit_bias": ids}
    return params


def prompts(name: str, value: Any) -> list[str | list[int]]:
    """One prompt or several, as text or token ids. Raises RequestError."""
    if isinstance(value, str) or (isinstance(value, list) and value and is_number(value[0])):
        value = [value]
    if not isinstance(value, list) or not value:
        problem = "is a list of 0" if value == [] else f"must be text, token ids or several, and is {kind(value)}"
        raise RequestError(f"{name} {problem}", name)
    return [_prompt(f"{name}[{i}]" if len(value) > 1 else name, entry, name) for i, entry in enumerate(value)]


def _prompt(where: str, value: Any, param: str) -> str | list[int]:
    if isinstance(value, list):
        if not value:
            raise RequestError(f"{where} must be a list of token ids, and is a list without any", param)
        for i, token in enumerate(value):
            if not is_id(token) or not 0 <= token < 2**31:
                raise RequestError(f"{where}[{i}] is {shown(token)}, and no token id", param)
        return value
    if not isinstance(value, str):
        raise RequestError(f"{where} must be text, and is {kind(value)}", param)
    if not value:
        raise RequestError(f"{where} is empty", param)
    return value


def texts(name: str, value: Any) -> list[str]:
    """One text or several, as a list. Raises RequestError."""
    several = [value] if isinstance(value, str) else value
    if not isinstance(several, list) or not several or not all(isinstance(text, str) for text in several):
        raise RequestError(f"{name} must be text, or a list of texts", name)
    return several


def is_number(value: Any) -> bool:
    """Whether a list that begins so is one of token ids, if a wrong one."""
    return isinstance(value, int | float) and not isinstance(value, bool)
