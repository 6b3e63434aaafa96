"""adapter_config.json of PEFT: what a low-rank adapter says of itself.

Format: `LoraConfig` of peft up to 0.21 (https://huggingface.co/docs/peft). Fields of the arithmetic are done or refused
by name; those of training alone are nobody's business here.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex

from jaxinfer.checkpoint.files import read_json
from jaxinfer.errors import CheckpointError
from jaxinfer.models.config import ConfigReader

CONFIG = "adapter_config.json"
SECONDS = 1.0  # for a pattern and a name
DONE = {
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias", "lora_bias", "use_dora"),
    *("fan_in_fan_out", "trainable_token_indices", "target_parameters", "init_lora_weights", "ensure_weight_tying"),
}
OF_TRAINING = {
    *("base_model_name_or_path", "revision", "inference_mode", "lora_dropout", "peft_version", "auto_mapping"),
    *("task_type", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config", "megatron_core"),
    *("qalora_group_size",),
}
# Ways to begin that leave the base as it is. After others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) an adapter belongs to a
# base that was changed, unless it was converted when it was saved, and then it says true.
PLAIN_BEGINNINGS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class AdapterConfig:
    """What changes the arithmetic.

    where: the file, for messages.
    rank, alpha: where no pattern says otherwise. rank_pattern, alpha_pattern: by patterns of modules' names.
    root: scales are alpha / sqrt(rank), not alpha / rank.
    targets, excluded: names of modules or how these end; a str is a pattern of the whole name; None: nothing is said.
    layers: numbers of layers, of which alone modules are targets; none: all. layer_names: patterns of what comes before
        the number; none: anything.
    saved: modules that are there as a whole.
    parameters: names of parameters that are targets, or how these end.
    tokens: rows of embeddings, by the module's name.
    ties: a tied head changes with the embedding.
    """

    where: str
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    root: bool
    targets: tuple[str, ...] | str | None
    excluded: tuple[str, ...] | str
    layers: tuple[int, ...]
    layer_names: tuple[str, ...]
    saved: tuple[str, ...]
    parameters: tuple[str, ...]
    tokens: Mapping[str, tuple[int, ...]]
    ties: bool

    def rank_of(self, module: str) -> int:
        return _by_pattern(self.rank_pattern, module, self.rank)

    @property
    def largest_rank(self) -> int:
        """That a module's factors may have."""
        return max((self.rank, *self.rank_pattern.values(), *map(len, self.tokens.values())))

    def scale_of(self, module: str) -> float:
        """What the product of the factors is multiplied with."""
        rank, alpha = self.rank_of(module), _by_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.root else rank)

    def is_target(self, module: str) -> bool:
        """Whether factors of a module count, by its name."""
        if _matches(self.excluded, module) or any(_match(rf"(^|.*\.){name}($|\..*)", module) for name in self.saved):
            return False
        if self.targets is None or self.targets == "all-linear":
            return True
        if not _matches(self.targets, module):
            return False
        if isinstance(self.targets, str) or module in self.targets or not self.layers:
            return True
        patterns = [rf"(?:^|.*?\.){name}" for name in self.layer_names] or [r".*?\.[^.]*"]
        found = next(filter(None, (_match(rf"{pattern}\.(\d+)\.", module) for pattern in patterns)), None)
        return found is not None and int(found[1]) in self.layers

    def parameters_of(self, module: str) -> list[str]:
        """Names within it of its parameters that are targets."""
        names = [name.rpartition(".") for name in self.parameters]
        own = [(before or "experts", name) for before, _, name in names]  # alone they are of whichever module has them
        return [name for before, name in own if _matches((before,), module)]


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Raises FileNotFoundError, and CheckpointError for what can't be done, by name."""
    path = folder / CONFIG
    if not os.path.lexists(path):
        raise FileNotFoundError(f"{path}: no such file; give the folder of an adapter as PEFT writes it")
    said = read_json(path).items()
    data = {name: value for name, value in said if value not in (None, {}, [], "") and value is not False}
    fields = ConfigReader(data, str(path))
    if data.get("peft_type") != "LORA":
        raise fields.error("peft_type", "only LORA is done here: apply it with peft, merge_and_unload(), and save that")
    begun = data.get("init_lora_weights", True)
    if begun not in PLAIN_BEGINNINGS and not str(begun).startswith("eva"):
        raise fields.error(
            "init_lora_weights",
            "the adapter belongs to a base that this changed: save it with path_initial_model_for_weight_conversion",
        )
    for name in data:
        if name not in DONE | OF_TRAINING:
            raise fields.error(name, "this is not done here; apply the adapter with peft, and merge it there")
    for name in ("r", "lora_alpha"):
        if dict(said).get(name, 0) is None:
            raise fields.error(name, "it must be a number")
    for name in ("use_dora", "lora_bias", "fan_in_fan_out"):  # that tensors say
        fields.boolean(name, False)
    rank = fields.integer("r", 8)
    return AdapterConfig(
        where=str(path),
        rank=rank,
        alpha=fields.number("lora_alpha", 8, above=False),
        rank_pattern=_numbers(fields, "rank_pattern", whole=True),
        alpha_pattern=_numbers(fields, "alpha_pattern"),
        root=fields.boolean("use_rslora", False),
        targets=_names(fields, "target_modules") or None,
        excluded=_names(fields, "exclude_modules"),
        layers=_integers(fields, "layers_to_transform"),
        layer_names=_listed(fields, "layers_pattern"),
        saved=_listed(fields, "modules_to_save"),
        parameters=_listed(fields, "target_parameters"),
        tokens=_tokens(fields),
        ties=fields.boolean("ensure_weight_tying", False),
    )


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The first that fits decides."""
    return next((value for name, value in patterns.items() if _match(rf"(.*\.)?({name})$", module)), default)


def _matches(names: tuple[str, ...] | str, module: str) -> bool:
    if isinstance(names, str):
        return bool(names) and _match(rf"(?:{names})\Z", module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _match(pattern: str, module: str) -> Any:
    """What Python's own would find. That nothing stops, and keeps all other threads waiting. Raises CheckpointError."""
    try:
        return regex.match(pattern, module, timeout=SECONDS, concurrent=True)
    except TimeoutError:
        raise CheckpointError(f"{CONFIG}: {pattern!r:.200} takes for ever to match names of modules") from None


def _names(fields: ConfigReader, name: str) -> tuple[str, ...] | str:
    value = fields.data.get(name)
    if not isinstance(value, str):
        return _listed(fields, name)
    return "all-linear" if value.lower() == "all-linear" else _pattern(fields, name, value)


def _listed(fields: ConfigReader, name: str) -> tuple[str, ...]:
    value = fields.data.get(name, [])
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise fields.error(name, "it must be a list of names")
    patterns = name in ("layers_pattern", "modules_to_save")
    return tuple(_pattern(fields, name, item) if patterns else item for item in value)


def _integers(fields: ConfigReader, name: str) -> tuple[int, ...]:
    value = fields.data.get(name, [])
    value = value if isinstance(value, list) else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in value):
        raise fields.error(name, "it must be integers of at least 0")
    return tuple(value)


def _numbers(fields: ConfigReader, name: str, whole: bool = False) -> dict[str, Any]:
    value = fields.data.get(name, {})
    if not isinstance(value, dict):
        raise fields.error(name, "it must be an object of numbers by names")
    own = ConfigReader(value, f"{fields.where}: {name}")
    read = own.integer if whole else own.number
    return {_pattern(fields, name, key): read(key) for key in value}


def _tokens(fields: ConfigReader) -> dict[str, tuple[int, ...]]:
    name = "trainable_token_indices"
    value = fields.data.get(name, {})
    value = value if isinstance(value, dict) else {"embed_tokens": value}
    own = ConfigReader(value, f"{fields.where}: {name}")
    return {module: _integers(own, module) for module in value}


def _pattern(fields: ConfigReader, name: str, text: str) -> str:
    """Raises CheckpointError for what is no pattern, and for one that is sure to take for ever."""
    try:
        re.compile(text)
        regex.compile(text)
    except (re.error, regex.error, RecursionError, OverflowError):
        raise fields.error(name, "it must be a regular expression") from None
    if len(text) > 4096 or re.search(r"[+*}]\)[+*{]", text):
        raise fields.error(name, "a regular expression of names must not repeat what repeats")
    return text
