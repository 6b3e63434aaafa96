"""Checkpoints into other forms: `jaxinfer convert`."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxinfer.checkpoint.adapter import Adapter
from jaxinfer.checkpoint.contents import beside
from jaxinfer.checkpoint.dequantized import DequantizedCheckpoint
from jaxinfer.checkpoint.files import read_config
from jaxinfer.checkpoint.hf import HfWriter, config_of
from jaxinfer.checkpoint.hub import resolve
from jaxinfer.checkpoint.load import FLOATS
from jaxinfer.checkpoint.merged import MergedCheckpoint
from jaxinfer.checkpoint.open import Weights, dtypes_of, load_weights, open_weights
from jaxinfer.checkpoint.orbax import MANIFEST, WEIGHTS, Converted, converted_config, manifest, save
from jaxinfer.checkpoint.output import Format, check_destination, put, put_beside, written
from jaxinfer.checkpoint.settle import as_stored
from jaxinfer.engine.config import DType, check_options
from jaxinfer.engine.load import placement_for
from jaxinfer.models.model import AbstractModel, Params
from jaxinfer.quantization.schemes import Quantization
from jaxinfer.sharding import describe

Onto = Literal["original", "dequantized"]

log = logging.getLogger("jaxinfer")


@dataclass(frozen=True)
class Conversion:
    """What was written.

    output, format: where, and as what.
    precision: schemes, and the dtype of what is in none.
    mesh: on which it was loaded, as a spec; "" on one device.
    bytes: of the weights.
    load_seconds: with quantizing.
    write_seconds: of writing.
    restore_seconds: of restoring what was written.
    restore_ratio: restoring over loading.
    merged_onto: to which weights an adapter was added, "original" or "nf4, dequantized"; "" without one.
    """

    output: str
    format: str
    precision: str
    mesh: str
    bytes: int
    load_seconds: float
    write_seconds: float
    restore_seconds: float
    restore_ratio: float
    merged_onto: str = ""


def convert(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    format: Format = "orbax",
    dtype: DType = "auto",
    quantization: Quantization | None = None,
    mesh: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    adapter: str | os.PathLike[str] | None = None,
    onto: Onto = "original",
    base_quantization: Quantization | None = None,
    show_progress: bool = True,
) -> Conversion:
    """Writes a checkpoint in another form: quantized, in another dtype, as `LLM` and all commands take it.

    adapter: the folder or hub id of a low-rank adapter in PEFT's format, which is merged into it; what is written is
    the sum in the base's dtypes, quantized after that. Its tokenizer counts, where it has one. onto: "dequantized" adds
    it to what the quantized checkpoint's weights stand for, or what those in floats would by base_quantization.

    output: a folder or gs:// URL that is not there yet; it is there as a whole or not at all. format: "orbax", which is
    restored straight into shards, on any mesh; "hf", safetensors as on the hub, in compressed-tensors' format if
    quantized. The others are as of `LLM`, but dtype "auto" keeps what the checkpoint has. Host memory: the result, and
    a few of the largest tensors.
    Raises ValueError and OSError with one line.
    """
    settings = check_options(
        {"dtype": dtype, "quantization": quantization, "mesh": mesh, "revision": revision, "token": token}
    )
    output = os.fspath(output)
    check_destination(output, format)
    if base_quantization is not None and onto != "dequantized":
        raise ValueError(f"base_quantization is {base_quantization!r}, and onto is {onto!r}: it must be 'dequantized'")
    folder = resolve(model, settings["revision"], settings["token"])
    config = read_config(folder)
    with contextlib.ExitStack() as stack:
        weights, folders, merged_onto = open_weights(folder), [folder], ""
        stack.enter_context(weights)
        if adapter is not None:
            if isinstance(weights, Converted):
                raise ValueError(f"{folder}: was written by convert: merge into the checkpoint that it was made from")
            own = stack.enter_context(Adapter(resolve(adapter, None, settings["token"])))
            merged_onto = onto
            if onto == "dequantized":
                config = as_stored(config, weights)
                weights = DequantizedCheckpoint(weights, config, stored_dtype(config, weights), base_quantization)
                config, merged_onto = weights.content, f"{weights.method}, dequantized"
            weights = MergedCheckpoint(weights, own, config)
            config, folders = weights.content, [folder, own.folder]
        config = as_stored(config, weights)
        if isinstance(weights, Converted):
            weights.check(settings["quantization"])
        kept = stored_dtype(config, weights) if settings["dtype"] == "auto" else jnp.dtype(settings["dtype"])
        if settings["dtype"] != "auto":
            config = {name: value for name, value in config.items() if name != "torch_dtype"} | {"dtype": str(kept)}
        abstract = AbstractModel.from_config(config, kept, settings["quantization"])
        placement = placement_for(abstract, settings["mesh"])
        with writing(output, format, abstract, config, *folders) as add:
            times = [time.perf_counter()]
            with bar("Read", abstract.nbytes, show_progress) as read:
                params = load_weights(abstract, weights, placement, read)
            times.append(time.perf_counter())
            size = sum(array.nbytes for array in params.values())
            add(params)
    times.append(time.perf_counter())
    where = "" if isinstance(placement, jax.Device) else describe(placement)
    load, write = np.diff(times).tolist()
    del params
    start = time.perf_counter()
    new = resolve(output)
    with open_weights(new) as weights:
        again = AbstractModel.from_config(read_config(new), kept)
        jax.block_until_ready(load_weights(again, weights, placement))
    back = time.perf_counter() - start
    return Conversion(output, format, abstract.precision, where, size, load, write, back, back / load, merged_onto)


@contextlib.contextmanager
def writing(
    output: str, format: Format, model: AbstractModel, config: Mapping[str, Any], *folders: Path
) -> Iterator[Callable[[Params], None]]:
    """What takes a model's parameters, a few at a time or all at once, and writes them. config: config.json's content.
    folders: where all else is that belongs to the checkpoint, of what is in several the last counts. Raises ValueError
    for what the format can't have."""
    for folder in folders:
        beside(folder)  # what can't be copied shows now
    if format == "hf":
        if model.weights.beside:
            log.warning("%s: the text model alone is written, without what sees or hears", output)
        with written(output) as path:
            with HfWriter(model, path) as writer:
                yield writer.add
            put(f"{path}/config.json", json.dumps(config_of(model, config), indent=2).encode())
            for folder in folders:
                put_beside(folder, path)
        return
    params: Params = {}
    with written(output) as path:
        yield params.update
        save(params, f"{path}/{WEIGHTS}")
        put(f"{path}/config.json", json.dumps(converted_config(model, config), indent=2).encode())
        for folder in folders:
            put_beside(folder, path)
        put(f"{path}/{MANIFEST}", manifest(params, f"{path}/{WEIGHTS}"))  # last, as it says that all is there
        params.clear()


def stored_dtype(config: Mapping[str, Any], weights: Weights) -> np.dtype[Any]:
    """The smallest dtype that holds all that is not quantized as it is. What quantized weights have beside them, scales
    above all, does not count."""
    stored = {dtype for name, dtype in dtypes_of(config, weights).items() if name.endswith((".weight", ".bias"))}
    stored &= set(FLOATS)
    return stored.pop() if len(stored) == 1 else np.dtype(np.float32)


@contextlib.contextmanager
def bar(what: str, total: int, shown: bool) -> Iterator[Callable[[int], Any]]:
    """A progress bar of bytes, on stderr if that is a terminal."""
    with tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=None if shown else True) as shown_bar:
        yield shown_bar.update
