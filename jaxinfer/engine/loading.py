"""What loading has in common, whatever the model is for."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxinfer import distributed
from jaxinfer.checkpoint.adapter_config import read_adapter_config
from jaxinfer.checkpoint.cross_encoder import CrossEncoderModel, read_cross_encoder, scores_by_logits
from jaxinfer.checkpoint.factors import changes
from jaxinfer.checkpoint.files import read_config
from jaxinfer.checkpoint.hub import resolve
from jaxinfer.checkpoint.sentence import MODULES, SentenceModel, read_model2vec, read_sentence_model
from jaxinfer.checkpoint.static import static_config
from jaxinfer.distributed import reported
from jaxinfer.engine.config import EngineConfig, check_options, in_our_words
from jaxinfer.engine.dtypes import computes_in
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.declared import Declarations
from jaxinfer.models.model import AbstractModel
from jaxinfer.models.registry import STATIC, parse_config, task_of
from jaxinfer.models.tasks import CLASSIFY, EMBED, GENERATE
from jaxinfer.models.wrapped import TEXT
from jaxinfer.sharding import local_devices, make_mesh
from jaxinfer.text.base import NoTokenizer, Tokenizer
from jaxinfer.text.tokenizer import LOOKED_FOR, has_tokenizer, load_tokenizer

log = logging.getLogger("jaxinfer")
MOST_ADAPTERS = 8  # in slots, where nothing is said
RANK = 16  # of adapters, where nothing is known


@dataclass(frozen=True)
class Opened:
    """A checkpoint, and what is wanted of it.

    folder: of the model itself.
    config: its config.json's content.
    task: what it is loaded for: GENERATE, EMBED or CLASSIFY.
    sentence: what a sentence-transformers folder says, where it is to embed.
    pairs: what is said of a model that classifies, and may score pairs of texts.
    settings: all options. given: those that are given.
    start: when loading began, by time.perf_counter.
    """

    folder: Path
    config: dict[str, Any]
    task: str
    sentence: SentenceModel | None
    pairs: CrossEncoderModel | None
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
    if settings["runner"] != "generate" and (scored := scores_by_logits(folder)) is not None:
        config = _overridden(read_config(scored.transformer), settings)
        return Opened(scored.transformer, config, CLASSIFY, None, scored, settings, given, start)
    has_modules = settings["runner"] != "generate" and os.path.lexists(folder / MODULES)
    if not has_modules or os.path.lexists(folder / "config.json"):  # cross-encoders may have modules, too
        config = _overridden(read_config(folder), settings)
        if config["model_type"] == STATIC and not has_modules:
            said = read_model2vec(folder, config)
            return Opened(folder, static_config(folder), EMBED, said, None, settings, given, start)
        task = _task(config, settings)
        if task == GENERATE and not has_modules and settings["hf_overrides"]:
            fields = settings["hf_overrides"]
            raise ValueError(f"hf_overrides is {fields!r:.100}: for models that make text, change config.json")
        pairs = None
        if task == CLASSIFY:  # a model that has other modules is refused later, saying what it is
            named = task_of(config) == CLASSIFY or not has_modules
            pairs = read_cross_encoder(folder, config) if named else CrossEncoderModel(folder)
        if not has_modules or pairs is not None:
            return Opened(folder, config, task, None, pairs, settings, given, start)
    sentence = read_sentence_model(folder)
    assert sentence is not None
    config = _overridden((static_config if sentence.is_table else read_config)(sentence.transformer), settings)
    return Opened(sentence.transformer, config, EMBED, sentence, None, settings, given, start)


def _overridden(config: dict[str, Any], settings: EngineConfig) -> dict[str, Any]:
    """A config.json's content with the fields that are said otherwise."""
    return {**config, **(settings["hf_overrides"] or {})}


def _task(config: Mapping[str, Any], settings: EngineConfig) -> str:
    """What a model is loaded for, if no sentence-transformers folder says it."""
    runner, convert, own = settings["runner"], settings["convert"], task_of(config)
    if runner == "generate" and convert in (EMBED, CLASSIFY):
        raise ValueError(f"convert is {convert!r}, and runner is 'generate': leave one of them out")
    if runner == "generate":
        return GENERATE
    if convert in (EMBED, CLASSIFY):
        return convert
    if any(config.get(name) for name in ("classifier_from_token", "is_original_qwen3_reranker")):
        return CLASSIFY
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


def open_adapters(settings: EngineConfig) -> dict[str, Path]:
    """The folders of adapters, by name; how many rows of a call may have, and their rank, are settled by them where
    nothing is said. Raises ValueError and FileNotFoundError."""
    folders = {name: resolve(folder, token=settings["token"]) for name, folder in (settings["adapters"] or {}).items()}
    ranks = [read_adapter_config(folder).largest_rank for folder in folders.values()]
    if settings["max_adapters"] is None and folders:
        settings["max_adapters"] = min(len(folders), MOST_ADAPTERS)
    if settings["max_adapters"] is not None and settings["max_lora_rank"] is None:
        settings["max_lora_rank"] = -(-max(ranks, default=RANK) // 8) * 8
    for option in ("max_lora_rank", "max_host_adapters"):
        if settings["max_adapters"] is None and (value := settings[option]) is not None:
            raise ValueError(f"{option} is {value}, and there are no adapters: give adapters or max_adapters")
    return folders


def settle_changes(settings: EngineConfig, adapters: Collection[Path], model: AbstractModel) -> None:
    """Whether adapters may change the vocabulary, and experts, where nothing is said: if one of them does. Raises
    ValueError and FileNotFoundError."""
    options = "adapted_vocabulary", "adapted_experts"
    if settings["max_adapters"] is None or all(settings[option] is not None for option in options):  # type: ignore[literal-required]
        return
    found = [changes(folder, model) for folder in adapters]
    for i, option in enumerate(options):
        if settings[option] is None:  # type: ignore[literal-required]
            settings[option] = any(own[i] for own in found)  # type: ignore[literal-required]


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
