"""Quantizing with a look at what goes through the weights: `jaxinfer quantize`.

Layer by layer: the activations of the calibration texts are on the host, and one layer's weights are in memory. A layer
is run once as it was, to see what its linears get, and once with what was made of it, so that the next ones see that.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxinfer.checkpoint.files import read_config
from jaxinfer.checkpoint.folder import Checkpoint
from jaxinfer.checkpoint.hub import resolve
from jaxinfer.checkpoint.load import load_params
from jaxinfer.checkpoint.open import open_weights
from jaxinfer.checkpoint.output import Format, check_destination
from jaxinfer.checkpoint.settle import as_stored
from jaxinfer.convert import stored_dtype, writing
from jaxinfer.engine.config import DType, check_options
from jaxinfer.layerwise import FEW, Given, Layers
from jaxinfer.models.model import AbstractModel, Params, scales
from jaxinfer.models.params import in_short
from jaxinfer.quantization.calibrate import carrying, channel_factors, gptq, round_to_nearest, times
from jaxinfer.quantization.quantize import pack
from jaxinfer.quantization.schemes import SCHEMES, Scheme
from jaxinfer.sharding import local_devices
from jaxinfer.text.tokenizer import load_tokenizer

log = logging.getLogger("jaxinfer")

Host = np.ndarray[Any, Any]
Text = str | Sequence[Mapping[str, Any]]  # a plain one, or a conversation
Method = Literal["awq", "gptq", "smoothquant"]


@dataclass(frozen=True)
class Calibration:
    """What was written.

    output, format: where, and in which format.
    scheme, method: how it was quantized.
    texts, tokens: that were looked at.
    seconds: that it took.
    """

    output: str
    format: str
    scheme: str
    method: str
    texts: int
    tokens: int
    seconds: float


def calibrate(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    texts: Iterable[Text],
    *,
    scheme: str,
    method: Method,
    format: Format = "orbax",
    dtype: DType = "auto",
    max_length: int = 512,
    max_tokens: int = 65536,
    revision: str | None = None,
    show_progress: bool = True,
) -> Calibration:
    """Quantizes a checkpoint by texts, plain ones or conversations, and writes it as `convert` does.

    method: "gptq" makes up for each column's error in those after it; "awq" (weights alone), "smoothquant" (activations
    too) scale channels first, which the norm or linear before takes back. Of each text `max_length` tokens are taken,
    of all together `max_tokens`. An output head of its own, what no layer has, and what fewer than FEW tokens went to
    (as happens to experts) is rounded to the nearest.
    Raises ValueError and OSError with one line: texts that have no two tokens, a method that is not for the scheme, an
    architecture that does not say what feeds what.
    """
    start = time.perf_counter()
    output = os.fspath(output)
    wanted = check_method(scheme, method)
    dtype = check_options({"dtype": dtype, "revision": revision})["dtype"]
    check_destination(output, format)
    folder = resolve(model, revision)
    config = read_config(folder)
    tokenizer = load_tokenizer(folder)
    encoded = (
        tokenizer.encode(text)
        if isinstance(text, str)
        else tokenizer.encode(tokenizer.chat_prompt(text, None, False), add_special_tokens=False)
        for text in texts
    )
    device = local_devices()[0]
    with open_weights(folder) as checkpoint:
        if not isinstance(checkpoint, Checkpoint):
            raise ValueError(f"{folder}: was converted: give the original checkpoint")
        config = as_stored(config, checkpoint)
        plain = AbstractModel.from_config(config, "float32")
        sequences = _cut(encoded, min(max_length, plain.config.max_context), max_tokens)
        kept = stored_dtype(config, checkpoint) if dtype == "auto" else jnp.dtype(dtype)
        target = AbstractModel.from_config(config, kept, scheme)
        layers = Layers(plain, device, sequences)
        if method != "gptq":
            layers.check_smoothing_pairs(str(config["model_type"]))
        with writing(output, format, target, config, folder) as add:
            rest = load_params(plain, checkpoint, device, only=layers.rest)
            add(_finished(target, {name: _rounded(target, name, value) for name, value in rest.items()}))
            hidden = layers.embed(rest)
            del rest
            few: dict[str, int] = {}
            for i, names in enumerate(tqdm(layers.names, desc="Layers", disable=None if show_progress else True)):
                params = load_params(plain, checkpoint, device, only=names)
                given, _ = layers.run(i, params, hidden, "hessian" if method == "gptq" else "sample")
                made = _quantize(target, layers, i, params, given, wanted, method)
                for path, seen in given.items():
                    if seen.few and (name := f"{layers.prefixes[i]}.{path}.weight") in target.quantized:
                        few[name] = seen.few
                add(_finished(target, made))
                _, hidden = layers.run(i, {n: _value(v) for n, v in made.items()}, hidden, None)
    if few:
        rounded = f"{sum(few.values())} matrices of {in_short(list(few))}"
        log.warning("%s: rounded to the nearest, as fewer than %d tokens went to each", rounded, FEW)
    tokens = sum(map(len, sequences))
    return Calibration(output, format, scheme, method, len(sequences), tokens, time.perf_counter() - start)


def check_method(scheme: str, method: str) -> Scheme:
    """The scheme. Raises ValueError if there is none, or if the method is not for it."""
    if method not in get_args(Method):
        raise ValueError(f"method is {method!r}: it must be one of {', '.join(get_args(Method))}")
    if scheme not in SCHEMES:
        raise ValueError(f"scheme is {scheme!r}: it must be one of {', '.join(SCHEMES)}")
    chosen = SCHEMES[scheme]
    if chosen.rows > 1:
        raise ValueError(f"scheme is {scheme!r}: its scales are of several rows, which no method is for: use convert")
    if chosen.table:
        raise ValueError(f"scheme is {scheme!r}: its values are no steps of one size, which methods need: use convert")
    if chosen.activations != (method == "smoothquant") and method != "gptq":
        fitting = "smoothquant and gptq are" if chosen.activations else "awq and gptq are"
        raise ValueError(f"method is {method!r}, and scheme {scheme!r}: {fitting} for that")
    return chosen


# What becomes of a parameter: itself, or values and scales.
Made = Host | tuple[Host, Host]


def _quantize(
    target: AbstractModel,
    layers: Layers,
    layer: int,
    params: Params,
    given: Mapping[str, Given],
    scheme: Scheme,
    method: Method,
) -> dict[str, Made]:
    """What becomes of a layer's parameters."""
    prefix = layers.prefixes[layer]
    weights = {name: np.array(value, np.float32) for name, value in params.items()}
    factors: dict[str, Host] = {}
    if method != "gptq":
        for source, taking in layers.feeds[layer]:
            paths = [path for path in taking if f"{prefix}.{path}.weight" in target.quantized]
            if paths:
                read = [weights[f"{prefix}.{path}.weight"] for path in paths]
                shared = _shared(target, read[0].shape[1], weights[f"{prefix}.{source}.weight"].shape[0])
                scale = channel_factors(read, given[paths[0]].sample, scheme, shared)
                fold(weights, f"{prefix}.{source}", [f"{prefix}.{path}" for path in taking], scale, shared)
                factors |= dict.fromkeys(paths, scale)
    made: dict[str, Made] = {}
    alike: dict[int, list[str]] = {}  # linears that are given the same
    for name, weight in weights.items():
        path = name.removeprefix(f"{prefix}.").removesuffix(".weight")
        if name in target.quantized and path in given:
            alike.setdefault(id(given[path]), []).append(path)
        else:
            made[name] = _rounded(target, name, weight)
    for paths in alike.values():
        some = [weights[f"{prefix}.{path}.weight"] for path in paths]
        factor = factors.get(paths[0], np.float32(1))
        calibrated = _calibrated(some, given[paths[0]], factor, scheme, method)
        made |= {f"{prefix}.{path}.weight": pair for path, pair in zip(paths, calibrated, strict=True)}
    return made


def _calibrated(
    weights: Sequence[Host], given: Given, factor: Host | np.float32, scheme: Scheme, method: Method
) -> list[tuple[Host, Host]]:
    """Values and scales of weights `[out, in]` or `[E, out, in]` that are given the same, divided by a factor."""
    made: list[list[tuple[Host, Host]]] = [[] for _ in weights]
    for e, tokens in enumerate(given.tokens):
        matrices = [weight.reshape(-1, *weight.shape[-2:])[e] for weight in weights]
        if tokens < FEW:
            pairs = [_nearest(matrix, scheme) for matrix in matrices]
        elif method == "gptq":
            errors_go = carrying(given.moments[e])
            pairs = [gptq(matrix, errors_go, scheme) for matrix in matrices]
        else:
            size = given.moments[e] / tokens / factor**2
            pairs = [round_to_nearest(matrix, size, scheme) for matrix in matrices]
        for made_of, pair in zip(made, pairs, strict=True):
            made_of.append(pair)
    shapes = [weight.shape[:-1] for weight in weights]
    stacked = [tuple(map(np.stack, zip(*pairs, strict=True))) for pairs in made]
    return [(v.reshape(*shape, -1), s.reshape(*shape, -1)) for shape, (v, s) in zip(shapes, stacked, strict=True)]


def _shared(target: AbstractModel, channels: int, source_channels: int) -> tuple[int, int, int] | None:
    """Where a linear takes more channels than its source gives: query heads that share the values of a head."""
    if channels == source_channels:
        return None
    config = target.config
    return config.num_kv_heads, config.num_heads // config.num_kv_heads, config.head_dim


def fold(
    weights: dict[str, Host], source: str, taking: Sequence[str], factors: Host, shared: tuple[int, int, int] | None
) -> None:
    """Multiplies columns of what takes a source's output by factors, and divides the source by them, so that all of it
    does what it did. shared: see channel_factors."""
    for name in taking:
        weights[f"{name}.weight"] *= factors
    divisor = factors if shared is None else factors.reshape(shared)[:, 0].reshape(-1)
    for name in (f"{source}.weight", f"{source}.bias"):
        if name in weights:
            weights[name] /= divisor.reshape(-1, *(1,) * (weights[name].ndim - 1))


def _rounded(target: AbstractModel, name: str, value: jax.Array | Host) -> Made:
    """Of a weight that no layer has, or of which nobody tells what goes into it."""
    host = np.asarray(value)
    if name not in target.quantized:
        return host.astype(target.abstract[name].dtype)
    return _nearest(host, target.quantized[name])


def _nearest(weight: Host, scheme: Scheme) -> tuple[Host, Host]:
    return round_to_nearest(weight, np.ones(weight.shape[-1], np.float32), scheme)


def _finished(target: AbstractModel, made: Mapping[str, Made]) -> dict[str, Any]:
    """Parameters as the model has them."""
    params: dict[str, Any] = {}
    for name, param in made.items():
        if isinstance(param, tuple):
            packed = target.quantized[name].packed > 1
            values = pack(param[0]) if packed else param[0].astype(target.abstract[name].dtype)
            params |= {name: np.ascontiguousarray(values), scales(name): param[1]}
        else:
            params[name] = param
    return params


def _value(param: Made) -> Host:
    """What a parameter stands for."""
    return times(*param) if isinstance(param, tuple) else param.astype(np.float32)


def _cut(texts: Iterable[Sequence[int]], max_length: int, max_tokens: int) -> list[list[int]]:
    sequences: list[list[int]] = []
    left = max_tokens
    for ids in texts:
        ids = list(ids[: min(max_length, left)])
        if len(ids) > 1:
            sequences.append(ids)
            left -= len(ids)
        if left < 1:
            break
    if not sequences:
        raise ValueError("there is nothing to calibrate with: at least one text must have two tokens")
    return sequences
