"""What each family is tried with: a file a family, which has VARIANTS, and MUTANTS of them.

A variant is a configuration of transformers that changes arithmetic. A mutant breaks one rule of the family: it has to
be seen, by far, or the variant's numbers say nothing about that rule.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.checkpoints import BASE, VOCAB

__all__ = [
    "BASE",
    "BODY",
    "CLASSES",
    "VOCAB",
    "Mutant",
    "Variant",
    "encoder_mutants",
    "encoders",
    "mutants",
    "of_ropes",
    "speaker",
    "variants",
]
BODY, CLASSES = "AutoModel", "AutoModelForSequenceClassification"
SPEAKING = ("AutoModelForCausalLM", "AutoModelForImageTextToText")


@dataclass(frozen=True)
class Variant:
    """A model of transformers.

    config: its configuration's class, and fields: of that.
    change: what is done to the saved folder afterwards.
    auto: the class of transformers that makes the model.
    """

    config: str
    fields: dict[str, Any]
    change: Callable[[Path], None] | None = None
    auto: str = "AutoModelForCausalLM"


@dataclass(frozen=True)
class Mutant:
    """A variant with a rule broken.

    variant: its name.
    change: of our configuration.
    """

    variant: str
    change: Callable[[Any], Any] = field(repr=False)


def of_ropes(**changes: Any) -> Callable[[Any], Any]:
    """A mutant's change of the rotary embeddings of all layers."""
    return lambda config: replace(config, ropes=tuple(rope and replace(rope, **changes) for rope in config.ropes))


def speaker(model: Any) -> Any:
    """What computes logits of text in a model of transformers: Llama 4's own forward can't do without images (5.24)."""
    return model.language_model if model.config.model_type == "llama4" else model


def _all(name: str) -> dict[str, Any]:
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    return {key: value for module in modules for key, value in getattr(module, name).items()}


def variants() -> dict[str, Variant]:
    """Of all families that make text, by name: the model_type, and what is special."""
    return {name: variant for name, variant in _all("VARIANTS").items() if variant.auto in SPEAKING}


def mutants() -> dict[str, Mutant]:
    """Of those."""
    return {name: mutant for name, mutant in _all("MUTANTS").items() if mutant.variant in variants()}


def encoders() -> dict[str, Variant]:
    """Of those of which whole texts are encoded, or classified, likewise."""
    return {name: variant for name, variant in _all("VARIANTS").items() if variant.auto not in SPEAKING}


def encoder_mutants() -> dict[str, Mutant]:
    """Of those."""
    return {name: mutant for name, mutant in _all("MUTANTS").items() if mutant.variant in encoders()}
