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
from jaxinfer.checkpoint.folder import Checkpoint
from jaxinfer.checkpoint.open import Weights, load_weights, open_weights
from jaxinfer.checkpoint.sentence import SentenceModel, read_steps
from jaxinfer.checkpoint.settle import as_stored
from jaxinfer.checkpoint.static import read_table
from jaxinfer.compile_cache import enable_compile_cache, executables_folder
from jaxinfer.distributed import reported
from jaxinfer.engine.compiled import open_folder
from jaxinfer.engine.config import OPTIONS, POOLINGS, EngineConfig
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
from jaxinfer.engine.pooling.engine import PoolingEngine
from jaxinfer.engine.pooling.programs import Pooler, PoolingPrograms, sizes_of
from jaxinfer.engine.programs import placed_params
from jaxinfer.errors import CheckpointError
from jaxinfer.layers.vectors import Normalize
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.declared import Declarations
from jaxinfer.models.model import AbstractModel, Params
from jaxinfer.models.registry import parse_config
from jaxinfer.models.tasks import CLASSIFY, with_task
from jaxinfer.quantization.stored import asked_for, check_stored
from jaxinfer.sharding import ROWS, axis_size, describe, devices_of
from jaxinfer.text.base import Tokenizer
from jaxinfer.text.tokenizer import check_vocabulary

log = logging.getLogger("jaxinfer")

OF_A_CACHE = (
    *("kv_cache_dtype", "kv_cache_memory", "page_size", "max_num_seqs", "memory_utilization", "enable_prefix_caching"),
    *("seed", "attention"),
)


@dataclass(frozen=True)
class LoadedPooling:
    """An engine and what it was made from.

    engine, tokenizer: ready for texts.
    folder, dtype, config: the checkpoint's, that of its weights here, and config.json's content.
    task: EMBED or CLASSIFY.
    sentence: what is done with a text, and with its tokens' vectors; of a model that classifies None.
    normalizes: vectors are of length 1 unless somebody wants them otherwise.
    size: of vectors, before they are cut; of a model that classifies how many classes there are.
    max_model_len: tokens of a text.
    load_seconds: that all of it took.
    """

    engine: PoolingEngine
    tokenizer: Tokenizer
    folder: Path
    dtype: np.dtype[Any]
    config: Mapping[str, Any]
    task: str
    sentence: SentenceModel | None
    normalizes: bool
    size: int
    max_model_len: int
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
    say = settings["on_progress"] or (lambda _: None)
    config, cache = with_task(opened.config, task), executables_folder()
    declarations = Declarations() if cache is None else open_declarations(cache)
    shape = declarations.config(config).config
    check_stored(config)
    sentence, pooler, normalizes, size = vectors_of(opened, shape)
    text_length(opened, sentence, shape)  # refused before anything is read
    tokenizer = read_tokenizer(folder, settings)
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
        programs = pooling_programs(abstract, placement, settings, pooler, text_length(opened, sentence, shape))
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
        engine, tokenizer, folder, dtype, config, task, sentence, normalizes, size, programs.max_model_len, seconds
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
    settings, config = opened.settings, with_task(opened.config, opened.task)
    shape = parse_config(config)[1]
    sentence, pooler, *_ = vectors_of(opened, shape)
    placement = choose_placement(shape, all_devices(), settings["mesh"])
    model = abstract_model(config, choose_dtype(settings["dtype"], config, None, placement), placement, settings)
    return pooling_programs(model, placement, settings, pooler, text_length(opened, sentence, shape))


def pooling_programs(
    model: AbstractModel,
    placement: jax.Device | Mesh,
    settings: EngineConfig,
    pooler: Pooler | None,
    max_model_len: int,
) -> PoolingPrograms:
    """With calls of as many tokens as these settings say."""
    on_cpu = devices_of(placement)[0].platform == "cpu"
    tokens = settings["max_num_batched_tokens"] or (1024 if on_cpu else 8192)
    budget = max(-(-tokens // axis_size(placement, ROWS)), 1)
    sizes = sizes_of(model.config, budget, max_model_len)
    return PoolingPrograms(model, placement, sizes, pooler, budget, max_model_len)


def vectors_of(opened: Opened, shape: ModelConfig) -> tuple[SentenceModel | None, Pooler | None, bool, int]:
    """How vectors are made of hidden states: see `sentence`, `normalizes` and `size` of LoadedPooling, and `pooler` of
    PoolingPrograms. Raises CheckpointError."""
    if opened.task == CLASSIFY:
        return None, None, False, 0 if shape.classifier is None else shape.classifier.num_labels
    sentence = _sentence(opened, shape)
    size = dataclasses.replace(sentence, dimensions=None).output_size(shape.output_size)
    steps = [step for step, _ in sentence.steps]
    normalizes = bool(steps) and isinstance(steps[-1], Normalize)
    # The last thing that is done, after the cut, and so by the host.
    pooler = Pooler(sentence.pooling, tuple(steps[:-1] if normalizes else steps), not sentence.include_prompt)
    return sentence, pooler, normalizes, size


def _sentence(opened: Opened, shape: ModelConfig) -> SentenceModel:
    """What the folder says, or `pooler_config` in its place. A model that sees only what came before has one token that
    has seen all."""
    asked, said = opened.settings["pooler_config"], opened.sentence
    if asked is not None:
        base = SentenceModel(opened.folder) if said is None else said
        steps = ((Normalize(), opened.folder),) if asked.get("normalize") in (None, True) else ()
        return dataclasses.replace(base, pooling=(POOLINGS[asked["pooling_type"]],), steps=steps)
    if said is None and shape.causal:
        return SentenceModel(opened.folder, ("lasttoken",), steps=((Normalize(), opened.folder),))
    if said is None:
        raise CheckpointError(
            f"{opened.folder}: nothing says how its tokens' vectors become one of a text (there is no modules.json); "
            'give pooler_config={"pooling_type": "MEAN"}, or CLS or LAST, as it was trained'
        )
    return said


def text_length(opened: Opened, sentence: SentenceModel | None, shape: ModelConfig) -> int:
    """How many tokens a text may have. Raises ValueError."""
    wanted, said = opened.settings["max_model_len"], None if sentence is None else sentence.max_seq_length
    if wanted is not None and wanted > shape.max_context:
        raise ValueError(
            f"max_model_len is {wanted}: {opened.folder / 'config.json'} defines the model for at most "
            f"{shape.max_context}"
        )
    return wanted or min(said or shape.max_context, shape.max_context)
