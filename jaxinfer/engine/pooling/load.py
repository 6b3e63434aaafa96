"""From a checkpoint to an engine that makes vectors or classes of whole texts."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxinfer import distributed
from jaxinfer.checkpoint.cross_encoder import CrossEncoderModel
from jaxinfer.checkpoint.folder import Checkpoint
from jaxinfer.checkpoint.open import Weights, load_weights, open_weights
from jaxinfer.checkpoint.sentence import SentenceModel, read_max_length, read_steps
from jaxinfer.checkpoint.settle import as_stored
from jaxinfer.checkpoint.static import read_table
from jaxinfer.compile_cache import enable_compile_cache, executables_folder
from jaxinfer.distributed import reported
from jaxinfer.engine.compiled import open_folder
from jaxinfer.engine.config import OPTIONS
from jaxinfer.engine.dtypes import choose_dtype
from jaxinfer.engine.executables import open_declarations, open_executables
from jaxinfer.engine.loading import (
    Opened,
    abstract_model,
    all_devices,
    check_architecture,
    choose_placement,
    read_tokenizer,
)
from jaxinfer.engine.option import OF_TOKENS, POOLINGS
from jaxinfer.engine.pooling.engine import PoolingEngine
from jaxinfer.engine.pooling.programs import Pooler, PoolingPrograms, sizes_of
from jaxinfer.engine.programs import placed_params
from jaxinfer.errors import CheckpointError
from jaxinfer.layers.vectors import Normalize
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.declared import Declarations
from jaxinfer.models.model import AbstractModel, Params
from jaxinfer.models.registry import parse_config
from jaxinfer.models.tasks import CLASSIFIER, CLASSIFY, HEAD_TOKENS, OF_STEPS, with_head_tokens, with_task
from jaxinfer.quantization.stored import asked_for, check_stored
from jaxinfer.sharding import ROWS, axis_size, describe, devices_of
from jaxinfer.text.base import Tokenizer
from jaxinfer.text.tokenizer import check_vocabulary

log = logging.getLogger("jaxinfer")

OF_A_CACHE = (
    *("kv_cache_dtype", "kv_cache_memory", "page_size", "max_num_seqs", "memory_utilization", "enable_prefix_caching"),
    *("seed", "attention", "adapters", "max_adapters", "max_lora_rank"),
    *("max_host_adapters", "adapted_vocabulary", "adapted_experts"),
)


@dataclass(frozen=True)
class LoadedPooling:
    """An engine and what it was made from.

    engine, tokenizer: ready for texts.
    folder, dtype, config: the checkpoint's, that of its weights here, and config.json's content.
    task: EMBED or CLASSIFY.
    sentence: what is done with a text, and with its tokens' vectors; of a model that classifies None.
    pairs: of a model that classifies what is said of pairs of texts; of others None.
    pooling: the option pooler_config, or nothing.
    of_tokens: each token has numbers of its own, where nothing else is asked for.
    normalizes: vectors are of length 1 unless somebody wants them otherwise.
    size: of vectors, before they are cut; of a model that classifies how many classes there are.
    max_model_len: tokens of a text, where nothing else is asked for. longest: that it may ever have.
    load_seconds: that all of it took.
    """

    engine: PoolingEngine
    tokenizer: Tokenizer
    folder: Path
    dtype: np.dtype[Any]
    config: Mapping[str, Any]
    task: str
    sentence: SentenceModel | None
    pairs: CrossEncoderModel | None
    pooling: Mapping[str, Any]
    of_tokens: bool
    normalizes: bool
    size: int
    max_model_len: int
    longest: int
    load_seconds: float

    def describe(self) -> str:
        """Weights in one line, and what comes out."""
        model, mesh = self.engine.model, self.engine.programs.mesh
        what = "classes" if self.task == CLASSIFY else "dimensions"
        return (
            f"weights {model.nbytes / 2**30:.2f} GiB in {model.precision}, {self.size} {what}, max_model_len "
            f"{self.max_model_len}" + (f", {describe(mesh)}" if mesh else "")
        )


@reported
def load_pooling(opened: Opened) -> LoadedPooling:
    """Raises ValueError, FileNotFoundError and other OSErrors, each with one line: what is wrong, where, what to do."""
    settings, folder, task = opened.settings, opened.folder, opened.task
    if distributed.group() is not None:
        raise ValueError(f"{folder}: on several hosts models that {task} are not run: take one host")
    for name in OF_A_CACHE:
        if settings[name] != OPTIONS[name].option.default:  # type: ignore[literal-required]
            raise ValueError(f"{name} is {settings[name]!r:.100}: models that {task} have no use for it; leave it out")  # type: ignore[literal-required]
    say, asked = settings["on_progress"] or (lambda _: None), settings["pooler_config"] or {}
    for name in ("normalize", "dimensions") if task == CLASSIFY else ("step_tag_id", "returned_token_ids"):
        if asked.get(name) is not None:
            raise ValueError(f"pooler_config: {name} is {asked[name]!r:.80}: models that {task} have no use for it")
    tokenizer = read_tokenizer(folder, settings)
    config, cache = task_config(opened, tokenizer), executables_folder()
    if HEAD_TOKENS in config:
        asked = {**asked, "returned_token_ids": None}  # the head has no others
    declarations = Declarations() if cache is None else open_declarations(cache)
    shape = declarations.config(config).config
    check_stored(config)
    sentence, pooler, normalizes, size = vectors_of(opened, shape)
    text_length(opened, sentence, shape)  # refused before anything is read
    check_vocabulary(tokenizer, shape.vocab_size)
    devices = all_devices()
    with open_weights(folder) as checkpoint:
        config = as_stored(config, checkpoint, declarations)
        if settings["architecture"] is not None:
            check_architecture(with_task(settings["architecture"], task), config, folder / "config.json")
        settings["quantization"] = opened.given["quantization"] = asked_for(settings["quantization"], config)
        compiled = None
        if settings["compiled"] is not None:
            compiled = open_folder(settings["compiled"], config, devices, opened.given, say, str(pooler))
            settings.update(compiled.manifest.options if compiled else {})  # type: ignore[typeddict-item]
        placement = choose_placement(shape, devices, settings["mesh"])
        dtype = choose_dtype(settings["dtype"], config, checkpoint, placement)
        abstract = abstract_model(config, dtype, placement, settings, declarations)
        longest = settings["max_model_len"] or shape.max_context
        programs = pooling_programs(abstract, placement, opened, sentence, pooler, longest)
        done = 0

        def on_array(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            say(f"loading weights {done / abstract.nbytes:.0%}")

        if sentence is not None and sentence.is_table:
            params = _table(abstract, checkpoint, placement)
        else:
            params = load_weights(abstract, checkpoint, placement, on_array)
    if pooler is not None and sentence is not None:
        weights = [array for own in read_steps(sentence) for array in own.values()]
        params |= {n: jax.device_put(a, programs.whole) for n, a in zip(pooler.shapes, weights, strict=True)}
    kept = None if cache is None or compiled is not None else open_executables(cache, programs)
    if kept is None:
        enable_compile_cache()
    engine = PoolingEngine(programs, params, say, compiled, kept)
    if settings["warmup"]:
        engine.warm_up()
    seconds = time.perf_counter() - opened.start
    loaded = LoadedPooling(
        *(engine, tokenizer, folder, dtype, config, task, sentence, opened.pairs, asked, programs.of_tokens),
        *(normalizes, size, programs.max_model_len, longest, seconds),
    )
    log.info("loaded %s in %.1f s: %s", folder, seconds, loaded.describe())
    return loaded


def _table(model: AbstractModel, checkpoint: Weights, placement: jax.Device | Mesh) -> Params:
    """The only parameter of a table of vectors."""
    assert isinstance(checkpoint, Checkpoint)
    ((name, array),) = placed_params(model, placement).items()
    return {name: jax.device_put(read_table(checkpoint).astype(array.dtype), array.sharding)}


def local_pooling_programs(opened: Opened) -> PoolingPrograms:
    """The programs of an engine for it on this machine's devices. Raises what load_pooling raises."""
    settings, config = opened.settings, task_config(opened)
    shape = parse_config(config)[1]
    sentence, pooler, *_ = vectors_of(opened, shape)
    placement = choose_placement(shape, all_devices(), settings["mesh"])
    model = abstract_model(config, choose_dtype(settings["dtype"], config, None, placement), placement, settings)
    return pooling_programs(model, placement, opened, sentence, pooler)


def pooling_programs(
    model: AbstractModel,
    placement: jax.Device | Mesh,
    opened: Opened,
    sentence: SentenceModel | None,
    pooler: Pooler | None,
    longest: int = 0,
) -> PoolingPrograms:
    """With calls of as many tokens as its options say, and for texts of so many, if they may be longer than usual."""
    on_cpu = devices_of(placement)[0].platform == "cpu"
    tokens = opened.settings["max_num_batched_tokens"] or (1024 if on_cpu else 8192)
    budget = max(-(-tokens // axis_size(placement, ROWS)), 1)
    length = text_length(opened, sentence, model.config)
    sizes = sizes_of(model.config, budget, max(length, longest))
    return PoolingPrograms(model, placement, sizes, pooler, budget, length, _of_tokens(opened))


def vectors_of(opened: Opened, shape: ModelConfig) -> tuple[SentenceModel | None, Pooler | None, bool, int]:
    """How vectors are made of hidden states: see `sentence`, `normalizes` and `size` of LoadedPooling, and `pooler` of
    PoolingPrograms. Raises CheckpointError."""
    if opened.task == CLASSIFY:
        return None, None, False, 0 if shape.classifier is None else shape.classifier.num_labels
    sentence, asked = _sentence(opened, shape), opened.settings["pooler_config"] or {}
    size = dataclasses.replace(sentence, dimensions=None).output_size(shape.output_size)
    steps = [step for step, _ in sentence.steps]
    normalizes = bool(steps) and isinstance(steps[-1], Normalize)
    # The last thing that is done, after the cut, and so by the host.
    pooler = Pooler(sentence.pooling, tuple(steps[:-1] if normalizes else steps), not sentence.include_prompt)
    wanted = asked.get("use_activation") if asked.get("normalize") is None else asked["normalize"]
    return sentence, pooler, normalizes if wanted is None else wanted, size


def _of_tokens(opened: Opened) -> bool:
    kind = (opened.settings["pooler_config"] or {}).get("pooling_type")
    return kind in OF_TOKENS or (opened.task == CLASSIFY and _names(opened.config).endswith(OF_STEPS))


def task_config(opened: Opened, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    """config.json's content with the task, and where a few words' logits are the classes with their ids."""
    pairs, asked = opened.pairs, opened.settings["pooler_config"] or {}
    kind = asked.get("pooling_type")
    if opened.task == CLASSIFY and kind in POOLINGS:
        raise ValueError(f"pooler_config: pooling_type is {kind!r}: a head for classes has its own; give ALL or STEP")
    tokens = () if pairs is None else pairs.tokens
    if not tokens and opened.task == CLASSIFY and not _names(opened.config).endswith(CLASSIFIER):
        tokens = tuple(asked.get("returned_token_ids") or ())  # each token's logits of these words
    if not tokens:
        return with_task(opened.config, opened.task)
    tokenizer = read_tokenizer(opened.folder, opened.settings) if tokenizer is None else tokenizer
    ids = [tokenizer.token_id(token) if isinstance(token, str) else token for token in tokens]
    if None in ids:
        raise CheckpointError(
            f"{opened.folder}: classifier_from_token: {tokens[ids.index(None)]!r:.80} is no token of its tokenizer; "
            "give ids"
        )
    difference = pairs is not None and pairs.difference
    return with_task(with_head_tokens(opened.config, [i for i in ids if i is not None], difference), opened.task)


def _names(config: Mapping[str, Any]) -> str:
    """The class that config.json names."""
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""


def _sentence(opened: Opened, shape: ModelConfig) -> SentenceModel:
    """What the folder says, or `pooler_config` in its place. A model that sees only what came before has one token that
    has seen all."""
    asked, said = opened.settings["pooler_config"] or {}, opened.sentence
    kind = asked.get("pooling_type")
    if kind == "STEP":
        raise ValueError("pooler_config: pooling_type is 'STEP': models that embed have no steps")
    if said is None and (kind in POOLINGS or kind in OF_TOKENS or shape.causal):
        said = SentenceModel(opened.folder, ("lasttoken",), steps=((Normalize(), opened.folder),))
    if said is None:
        raise CheckpointError(
            f"{opened.folder}: nothing says how its tokens' vectors become one of a text (there is no modules.json); "
            'give pooler_config={"pooling_type": "MEAN"}, or CLS or LAST, as it was trained'
        )
    if kind in POOLINGS:
        said = dataclasses.replace(said, pooling=(POOLINGS[kind],), steps=((Normalize(), opened.folder),))
    return said if asked.get("dimensions") is None else dataclasses.replace(said, dimensions=asked["dimensions"])


def text_length(opened: Opened, sentence: SentenceModel | None, shape: ModelConfig) -> int:
    """How many tokens a text may have: as many as is said beside the model, or else of its tokenizer. Raises
    ValueError."""
    spoken = sentence or opened.pairs
    wanted, said = opened.settings["max_model_len"], None if spoken is None else spoken.max_seq_length
    said = read_max_length(opened.folder) if said is None else said
    if wanted is not None and wanted > shape.max_context:
        raise ValueError(
            f"max_model_len is {wanted}: {opened.folder / 'config.json'} defines the model for at most "
            f"{shape.max_context}"
        )
    return wanted or min(said or shape.max_context, shape.max_context)
