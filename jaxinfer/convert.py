"""Checkpoints into other forms: `jaxinfer convert`."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from tqdm import tqdm

from jaxinfer.checkpoint.files import read_config
from jaxinfer.checkpoint.hf import HfWriter, check_hf, config_of
from jaxinfer.checkpoint.hub import resolve
from jaxinfer.checkpoint.load import FLOATS
from jaxinfer.checkpoint.open import Weights, load_weights, open_weights
from jaxinfer.checkpoint.orbax import MANIFEST, WEIGHTS, Converted, manifest, save
from jaxinfer.checkpoint.output import check_output, put, put_beside, written
from jaxinfer.engine.load import place_for
from jaxinfer.engine.options import check_options
from jaxinfer.models.model import Model
from jaxinfer.models.registry import REGISTRY
from jaxinfer.sharding import describe

Format = Literal["orbax", "hf"]


@dataclass(frozen=True)
class Conversion:
    """What was written: the quantization, the dtype of what is not quantized, bytes of the weights, and the seconds
    that loading (and quantizing), writing, and restoring what was written took. restore_ratio: restoring over loading.
    """

    output: str
    format: str
    quantization: Any
    dtype: str
    mesh: str
    bytes: int
    load_seconds: float
    write_seconds: float
    restore_seconds: float | None = None
    restore_ratio: float | None = None


def convert(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    format: Format = "orbax",
    show_progress: bool = True,
    **options: Any,
) -> Conversion:
    """Writes a checkpoint in another form: quantized, in another dtype, as `LLM` and all commands take it.

    output: a folder or gs:// URL that is not there yet; it is there as a whole or not at all. format: "orbax", which is
    restored straight into shards, on any mesh; "hf", safetensors as on the hub, in compressed-tensors' format if
    quantized. options: dtype, quantization, mesh, revision and token, as of `LLM`.
    dtype "auto" keeps what the checkpoint has. Host memory: the result, and a few of the largest tensors.
    Raises ValueError and OSError with one line.
    """
    if format not in get_args(Format):
        raise ValueError(f"format is {format!r}: it must be one of {', '.join(get_args(Format))}")
    given = check_options(options)
    output = os.fspath(output)
    fs, _ = check_output(output)
    if format == "hf" and not isinstance(fs, LocalFileSystem):
        raise ValueError(f"output {output}: format hf is written into a folder here, and can then be copied")
    folder = resolve(model, given["revision"], given["token"])
    config = dict(read_config(folder, REGISTRY))
    with written(output) as path, open_weights(folder) as weights:
        quantization = given["quantization"]
        if isinstance(weights, Converted):
            quantization = weights.scheme(quantization)
        dtype = stored_dtype(weights) if given["dtype"] == "auto" else jnp.dtype(given["dtype"])
        if given["dtype"] != "auto":
            config = {name: value for name, value in config.items() if name != "torch_dtype"} | {"dtype": str(dtype)}
        abstract = Model.from_config(config, dtype, quantization)
        if format == "hf":
            check_hf(abstract)
        place = place_for(abstract, given["mesh"])
        times = [time.perf_counter()]
        with _bar("Read", weights.nbytes, show_progress) as read:
            params = load_weights(abstract, weights, place, read)
        times.append(time.perf_counter())
        size = sum(array.nbytes for array in params.values())
        if format == "hf":
            with HfWriter(abstract, path) as writer, _bar("Written", size, show_progress) as done:
                writer.add(params, done)
            config = config_of(abstract, config)
        else:
            save(params, f"{path}/{WEIGHTS}")
        put(f"{path}/config.json", json.dumps(config, indent=2).encode())
        put_beside(folder, path)
        if format == "orbax":
            put(
                f"{path}/{MANIFEST}", manifest(abstract, params, f"{path}/{WEIGHTS}")
            )  # last: it says that all is there
        times.append(time.perf_counter())
        del params
        if format == "hf" and abstract.quantized:
            return Conversion(
                output, format, quantization, str(dtype), "", size, times[1] - times[0], times[2] - times[1]
            )
        with open_weights(Path(path)) as new:
            jax.block_until_ready(load_weights(abstract, new, place))
        times.append(time.perf_counter())
    load, write, back = np.diff(times).tolist()
    where = "" if isinstance(place, jax.Device) else describe(place)
    return Conversion(output, format, quantization, str(dtype), where, size, load, write, back, back / load)


def stored_dtype(weights: Weights) -> np.dtype[Any]:
    """The smallest dtype that holds all that is not quantized as it is."""
    stored = {info.dtype for info in weights.tensors.values() if info.dtype in FLOATS}
    return stored.pop() if len(stored) == 1 else np.dtype(np.float32)


@contextlib.contextmanager
def _bar(what: str, total: int, shown: bool) -> Iterator[Callable[[int], Any]]:
    """A progress bar of bytes, on stderr if that is a terminal."""
    with tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=None if shown else True) as bar:
        yield bar.update
