"""The folder of a low-rank adapter as PEFT writes it: which tensors change which weights, and how.

Source: LoRA (https://arxiv.org/abs/2106.09685), rsLoRA (2312.03732), DoRA (2402.09353); peft's `tuners/lora` for names
and shapes.
"""

from __future__ import annotations

import logging
import os
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from jaxinfer.checkpoint.adapter_config import read_adapter_config
from jaxinfer.checkpoint.files import check_folder, some
from jaxinfer.checkpoint.folder import PICKLED, SAFETENSORS
from jaxinfer.checkpoint.tensors import TensorInfo
from jaxinfer.errors import CheckpointError

log = logging.getLogger("jaxinfer")

Array = np.ndarray[Any, np.dtype[Any]]

_PREFIX = re.compile(r"(base_model\.model\.|base_model\.)?")
_FACTOR = re.compile(r"(?P<module>.+?)\.(?P<kind>lora_A|lora_B)(\.default)?\.(?P<end>weight|bias)")
_EMBEDDING = re.compile(r"(?P<module>.+?)\.lora_embedding_(?P<kind>[AB])(\.default)?")
_MAGNITUDE = re.compile(r"(?P<module>.+?)\.lora_magnitude_vector(\.default)?(\.weight)?")
_TOKENS = re.compile(r"(?P<module>.+?)\.token_adapter\.trainable_tokens_delta(\.default)?")
_WRAPPED = re.compile(r"\.(base_layer|token_adapter|modules_to_save(\.default)?)(?=\.)")
_EXPERTS = ("gate_up_proj", "down_proj")  # in which order modules have them


@dataclass
class Change:
    """What is done to a module, by names of the adapter's tensors.

    a, b: factors; `[r, in]` and `[out, r]`, of an embedding `[r, vocabulary]` and `[features, r]`, of E experts
        `[E r, in]` with the experts outside and `[out, r E]` with the experts inside.
    bias: of b. magnitude: f[out], the lengths that rows have afterwards; of an embedding columns.
    scale: of the factors' product, and of the bias.
    is_embedding: its weight is `[vocabulary, features]`.
    rows: what some rows become. tokens: which.
    """

    scale: float = 1.0
    a: str | None = None
    b: str | None = None
    bias: str | None = None
    magnitude: str | None = None
    is_embedding: bool = False
    rows: str | None = None
    tokens: tuple[int, ...] = ()


def by_expert(a: Array, b: Array, experts: int) -> tuple[Array, Array]:
    """Factors of a parameter of all experts, `[E r, in]` and `[out, r E]`, as those of each: `[E, r, in]` and
    `[E, out, r]`."""
    return a.reshape(experts, -1, a.shape[-1]), b.reshape(b.shape[0], -1, experts).transpose(2, 0, 1)


class Adapter:
    """One that is open.

    folder: as a path. config: what it says of itself.
    changes: by the names of modules, and of parameters, as transformers has them.
    saved: tensors that take the place of the base's, by the base's name, under the names of the adapter.

    Use it as a context manager. Threads may share it. Raises FileNotFoundError and CheckpointError, with what is wrong.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = check_folder(folder)
        self.config = read_adapter_config(self.folder)
        kinds = [kind for kind in (SAFETENSORS, PICKLED) if os.path.lexists(self.folder / kind.adapter)]
        if not kinds:
            raise FileNotFoundError(f"{self.folder}: no weights; expected {SAFETENSORS.adapter} or {PICKLED.adapter}")
        self._file = kinds[0].reader(self.folder / kinds[0].adapter)
        self.changes: dict[str, Change] = {}
        self.saved: dict[str, str] = {}
        try:
            self._sort()
            self._check()
        except BaseException:
            self.close()
            raise

    def info(self, name: str) -> TensorInfo:
        return self._file.tensors[name]

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> Array:
        """A tensor, or a part of it, as float32."""
        return self._file.read(self.info(name), index).astype(np.float32)

    def changes_nothing(self) -> bool:
        """Whether all it has are factors whose product is 0: what PEFT makes before it is trained."""
        return not self.saved and not any(
            change.b is None or change.magnitude or change.rows or change.bias or self.read(change.b).any()
            for change in self.changes.values()
        )

    def warn_if_idle(self) -> None:
        """Says in the log that it changes nothing, if that is so."""
        if self.changes_nothing():
            log.warning("%s: changes nothing, all its lora_B are zeros: was it trained?", self.folder)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _sort(self) -> None:
        changes: dict[str, Change] = defaultdict(Change)
        of_parameters: dict[str, list[str]] = defaultdict(list)  # wrapped ones by the module, the outermost first
        for name in self._file.tensors:
            path = _PREFIX.sub("", name, count=1)
            if factor := _FACTOR.fullmatch(path):
                module = factor["module"]
                inner = module.removesuffix(".base_layer")
                while inner.endswith(".base_layer"):
                    inner = inner.removesuffix(".base_layer")
                if self.config.parameters_of(inner):
                    of_parameters[inner] += [] if module in of_parameters[inner] else [module]
                change = changes[module]
                kind = "bias" if factor["end"] == "bias" else factor["kind"][-1].lower()
                setattr(change, kind, name)
            elif factor := _EMBEDDING.fullmatch(path):
                change = changes[factor["module"]]
                change.is_embedding = True
                setattr(change, factor["kind"].lower(), name)
            elif found := _MAGNITUDE.fullmatch(path):
                changes[found["module"]].magnitude = name
            elif found := _TOKENS.fullmatch(path):
                changes[found["module"]].rows = name
            elif ".original_module." not in path:
                self.saved[_WRAPPED.sub("", path)] = name
        for module, wrapped in of_parameters.items():
            self._name_parameters(module, sorted(wrapped, key=len), changes)
        self.changes = {_WRAPPED.sub("", f"{module}.").removesuffix("."): change for module, change in changes.items()}

    def _name_parameters(self, module: str, wrapped: list[str], changes: dict[str, Change]) -> None:
        """Gives factors of parameters the names of these: what was wrapped last is outside."""
        known = self.config.parameters_of(module)
        if known == ["weight"]:  # of a linear that is no module of its own
            return
        names = [name for name in _EXPERTS if name in known]
        if set(known) - set(_EXPERTS) or len(names) != len(wrapped):
            raise self._error(
                f"target_parameters has {some(known)} of {module}, and there are factors of {len(wrapped)}"
            )
        for own, name in zip(wrapped, reversed(names), strict=True):
            changes[f"{module}.{name}"] = changes.pop(own)

    def _check(self) -> None:
        config = self.config
        aliens, halves, ranks = [], [], []
        for module, change in self.changes.items():
            change.scale = config.scale_of(module)
            if change.rows is not None:
                change.tokens = self._tokens(module, change.rows)
            if change.a is None and change.b is None and change.rows is not None:
                continue
            if change.a is None or change.b is None:
                halves.append(module)
                continue
            parent, _, name = module.rpartition(".")
            experts = name in config.parameters_of(parent) or config.parameters_of(module) == ["weight"]
            if not (experts or config.is_target(module) or (config.ties and name == "lm_head")):
                aliens.append(module)
            if len(self.info(change.a).shape) != 2 or len(self.info(change.b).shape) != 2:
                raise CheckpointError(f"{self._file.path}: factors of {some([module])} are no matrices")
            rank, other = self.info(change.a).shape[0], self.info(change.b).shape[1]
            wanted = config.rank_of(module)
            if rank != other or rank % wanted or (rank != wanted and not experts) or not rank:
                ranks.append(f"{module} has {rank} and {other}, not {wanted}")
        problems = [
            f"{what}: {some(names)}"
            for what, names in (
                ("modules that are no targets by adapter_config.json", aliens),
                ("modules with one factor only, the file is not complete", halves),
                ("ranks that are not those of adapter_config.json", ranks),
            )
            if names
        ]
        if not self.changes and not self.saved:
            problems.append("has no tensors")
        if problems:
            raise CheckpointError(f"{self._file.path}: {'; '.join(problems)}")

    def _tokens(self, module: str, name: str) -> tuple[int, ...]:
        named = [ids for key, ids in self.config.tokens.items() if module == key or module.endswith(f".{key}")]
        if not named or len(named[0]) != self.info(name).shape[0]:
            raise self._error(
                f"trainable_token_indices does not say which {self.info(name).shape[0]} rows {module} has"
            )
        return named[0]

    def _error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.config.where}: {problem}")
