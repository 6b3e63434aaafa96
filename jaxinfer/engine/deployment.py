"""A deployment in a YAML file: which model, its architecture, the slice that it is for, and how it is loaded.

    model: meta-llama/Llama-3.1-8B-Instruct   # a folder, seen from where the command runs, or a hub id
    topology: v5e-8                           # what `jaxinfer plan` plans for
    mesh: tensor=8                            # this and all else: the options of LLM, by their names
    dtype: bfloat16
    architecture:                             # fields of its config.json, so that planning needs no download
      model_type: llama
      hidden_size: 4096

Files are data: no tags, no aliases, no key twice, and nothing that is not known.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from jaxinfer.aliases.loading import LOADING
from jaxinfer.engine.config import NONE_IS_DEFAULT, EngineConfig, check_options, in_our_words, which
from jaxinfer.models.registry import model_types

MAX_BYTES = 2**20
PLACES = ("model", "topology")
FIELDS = (*PLACES, *which(is_data=True))


@dataclass(frozen=True)
class Deployment:
    """What a file says.

    path: the file's.
    model: a folder or a hub id.
    topology: the slice that it is for; None where the file names none.
    options: of `LLM`, the architecture among them, as far as they are given.
    lines: of each field; of a field of the architecture as "architecture.hidden_size".
    """

    path: Path
    model: str
    topology: str | None
    options: dict[str, Any]
    lines: Mapping[str, int]

    @property
    def architecture(self) -> Mapping[str, Any] | None:
        """Fields of the model's config.json, unless the file leaves them to it."""
        return self.options.get("architecture")

    def wrong_architecture(self, error: ValueError) -> ValueError:
        """What reading the architecture has raised, with where it is."""
        text = str(error).replace("config.json", "architecture", 1)
        field = re.match(r"architecture: (\w+)", text)
        line = self.lines.get(f"architecture.{field[1]}" if field else "", self.lines["architecture"])
        return ValueError(f"{self.path}:{line}: {text}")

    def loading(
        self, model: str | os.PathLike[str] | None, options: EngineConfig
    ) -> tuple[str | os.PathLike[str], EngineConfig]:
        """What LLM is to be given, if these come before what the file says. A revision is its model's."""
        defaults = {n: v for n, v in self.options.items() if model is None or n != "revision"}
        return self.model if model is None else model, cast(EngineConfig, defaults | options)


def read_deployment(path: str | os.PathLike[str]) -> Deployment:
    """Reads and checks a file; JAX is not needed for it.

    Raises FileNotFoundError and other OSErrors, and ValueError that names the file, the line, the field and what may be
    there.
    """
    path = Path(path)
    lines, fields = _read(path)

    def wrong(name: str, problem: object) -> ValueError:
        return ValueError(f"{path}:{lines[name]}: {problem}")

    for name, value in fields.items():
        if name not in FIELDS:
            why = f": {LOADING.word(name)}" if name in LOADING else f"; there are {', '.join(FIELDS)}"
            raise wrong(name, f"there is no field {name!r}{why}")
        if name not in PLACES:
            try:
                if value is None and name in NONE_IS_DEFAULT:  # in a file it is a mistake
                    raise ValueError(f"{name} is None: leave it out")
                check_options({name: value})
                fields[name] = in_our_words({name: value})[name]  # type: ignore[literal-required]
            except ValueError as error:
                raise wrong(name, error) from None
        elif not isinstance(value, str) or not value:
            example = {"model": "a folder or a hub id", "topology": "a slice such as v5e-8"}[name]
            raise wrong(name, f"{name} is {value!r:.100}: it must be {example}")
    if "model" not in fields:
        raise ValueError(f"{path}: model is missing: a folder or a hub id")
    architecture = fields.get("architecture")
    if architecture is not None and architecture.get("model_type") not in model_types():
        model_type = architecture.get("model_type")
        raise wrong("architecture", f"model_type is {model_type!r:.100}: it must be one of {', '.join(model_types())}")
    options = {name: value for name, value in fields.items() if name not in PLACES}
    return Deployment(path, fields["model"], fields.get("topology"), options, lines)


def _read(path: Path) -> tuple[dict[str, int], dict[str, Any]]:
    """The line of each field, and its value."""
    content = path.read_bytes()
    if len(content) > MAX_BYTES:
        raise ValueError(f"{path}: {len(content)} bytes are more than the {MAX_BYTES} of a deployment's file")
    try:
        loader = _Loader(content)
        node = loader.get_single_node()
        fields = loader.construct_document(node) if isinstance(node, yaml.MappingNode) else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"{path}:{mark.line + 1}" if mark else path
        raise ValueError(f"{at}: not usable as YAML: {error.problem or error.context}") from None
    except RecursionError:
        raise ValueError(f"{path}: not usable as YAML: nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # also of a date that is none, or of thousands of digits
        raise ValueError(f"{path}: not usable as YAML: {' '.join(str(error).split())[:200]}") from None
    if node is None or fields is None:
        raise ValueError(f"{path}: a deployment is fields, `name: value`, one a line")
    lines = {}
    for key, value in node.value:
        lines[key.value] = key.start_mark.line + 1
        if isinstance(value, yaml.MappingNode):
            lines |= {f"{key.value}.{name.value}": name.start_mark.line + 1 for name, _ in value.value}
    return lines, fields


class _Loader(yaml.SafeLoader):
    """Of plain data: aliases would let a small file become a huge one, and of a key that is there twice one would win
    in silence."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            problem = f"*{event.anchor} is an alias; say it again"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                raise yaml.MarkedYAMLError(problem="a field's name must be a word", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is there twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# As config.json writes numbers: to YAML 1.1, 1e-05 is a word.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)
