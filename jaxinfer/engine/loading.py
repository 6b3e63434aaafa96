"""What loading has in common, whatever the model is for."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxinfer import distributed
from jaxinfer.checkpoint.files import read_config
from jaxinfer.checkpoint.hub import resolve
from jaxinfer.checkpoint.sentence import MODULES, SentenceModel, read_sentence_model
from jaxinfer.distributed import reported
from jaxinfer.engine.config import EngineConfig, check_options, in_our_words
from jaxinfer.engine.dtypes import computes_in
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.declared import Declarations
from jaxinfer.models.model import AbstractModel
from jaxinfer.models.registry import parse_config, task_of
from jaxinfer.models.tasks import CLASSIFY, EMBED, GENERATE
from jaxinfer.models.wrapped import TEXT
from jaxinfer.sharding import local_devices, make_mesh
from jaxinfer.text.base import NoTokenizer, Tokenizer
from jaxinfer.text.tokenizer import LOOKED_FOR, has_tokenizer, load_tokenizer

log = logging.getLogger("jaxinfer")


@dataclass(frozen=True)
class Opened:
    """A checkpoint, and what is wanted of it.

    folder: of the model itself.
    config: its config.json's content.
    task: what it is loaded for: GENERATE, EMBED or CLASSIFY.
    sentence: what a sentence-transformers folder says, where it is to embed.
    settings: all options. given: those that are given.
    start: when loading began, by time.perf_counter.
    """

    folder: Path
    config: dict[str, Any]
    task: str
    sentence: SentenceModel | None
    settings: EngineConfig
    given: dict[str, Any]
    start: float


@reported
def open_model(model: str | os.PathLike[str], **options: Any) -> Opened:
    """Finds a folder in Hugging Face's format, or a hub id, and what it is for. Raises ValueError, FileNotFoundError
    and other OSErrors."""
    start = time.perf_counter()
    settings, given = check_options(options), dict(in_our_words(options))
    folder = resolve(model, settings["revision"], settings["token"])
    if settings["runner"] == "generate" or not os.path.lexists(folder / MODULES):
        config = read_config(folder)
        return Opened(folder, config, _task(config, settings), None, settings, given, start)
    if os.path.lexists(folder / "config.json"):  # cross-encoders have modules, too
        config = read_config(folder)
        if _task(config, settings) == CLASSIFY:
            return Opened(folder, config, CLASSIFY, None, settings, given, start)
    sentence = read_sentence_model(folder)
    assert sentence is not None
    return Opened(sentence.transformer, read_config(sentence.transformer), EMBED, sentence, settings, given, start)


def _task(config: Mapping[str, Any], settings: EngineConfig) -> str:
    """What a model is loaded for, if no sentence-transformers folder says it."""
    runner, convert, own = settings["runner"], settings["convert"], task_of(config)
    if runner == "generate" and convert in (EMBED, CLASSIFY):
        raise ValueError(f"convert is {convert!r}, and runner is 'generate': leave one of them out")
    if runner == "generate":
        return GENERATE
    if convert in (EMBED, CLASSIFY):
        return convert
    return EMBED if runner == "pooling" and own == GENERATE else own


def read_tokenizer(folder: Path, settings: EngineConfig) -> Tokenizer:
    """The one that is asked for, the checkpoint's own, or a stand-in that says that there is none."""
    if settings["skip_tokenizer_init"]:
        return NoTokenizer(folder, "skip_tokenizer_init loads none")
    if settings["tokenizer"] is not None:
        return load_tokenizer(resolve(settings["tokenizer"], token=settings["token"], weights=False))
    if has_tokenizer(folder):
        return load_tokenizer(folder)
    log.warning("%s has no tokenizer (%s): it takes and gives token ids only", folder, LOOKED_FOR)
    return NoTokenizer(folder, f"{folder} has none")


def check_architecture(wanted: Mapping[str, Any], config: Mapping[str, Any], path: Path) -> None:
    """Whether `config`, the content of `path`, is of the same architecture, however it is spelt. Raises ValueError."""
    if wanted.get("model_type") != config.get("model_type"):
        raise _disagreement(path, "model_type", config.get("model_type"), wanted.get("model_type"))
    _, actual = parse_config(config)
    try:
        _, expected = parse_config(wanted)
    except ValueError as error:
        raise ValueError(str(error).replace("config.json", "architecture", 1)) from None
    if type(actual) is not type(expected):
        kind, other = ((fields.get(TEXT) or {}).get("model_type") for fields in (config, wanted))
        raise _disagreement(path, f"{TEXT}.model_type", kind, other)
    for field in dataclasses.fields(actual):
        value, other = getattr(actual, field.name), getattr(expected, field.name)
        if value != other:
            raise _disagreement(path, field.name, value, other)


def _disagreement(path: Path, name: str, value: object, wanted: object) -> ValueError:
    return ValueError(
        f"{path}: {name} is {value!r:.200}, and the deployment's architecture says {wanted!r:.200}: give the model "
        "that is meant, or its architecture"
    )


def abstract_model(
    config: Mapping[str, Any],
    dtype: np.dtype[Any],
    placement: jax.Device | Mesh,
    settings: EngineConfig,
    declarations: Declarations | None = None,
) -> AbstractModel:
    asked, computed = (settings["quantization"], dtype, settings["max_model_len"]), computes_in(dtype, placement)
    return AbstractModel.from_config(config, computed, *asked, declarations)


def all_devices() -> list[jax.Device]:
    """Of this machine; where several hosts have one model, of all of them."""
    return local_devices() if distributed.group() is None else jax.devices()


def choose_placement(shape: ModelConfig, devices: Sequence[jax.Device], mesh: str | None) -> jax.Device | Mesh:
    """What holds the model: a mesh, or the first device."""
    alone = devices[0].process_index == devices[-1].process_index
    wanted = 1 if devices[0].platform == "cpu" and alone else len(devices)
    sizes = shape.split_heads, shape.num_kv_heads, shape.hidden_size
    return make_mesh(mesh, devices, *sizes, wanted, shape.experts_per_token > 0) or devices[0]
