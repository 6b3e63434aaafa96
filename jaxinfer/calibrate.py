"""Quantizing with a look at what goes through the weights: `jaxinfer quantize`.

Layer by layer: the activations of the calibration texts are on the host, and one layer's weights are in memory. A layer
is run once as it was, to see what its linears get, and once with what was made of it, so that the next ones see that.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from jaxinfer.attention import ForwardBatch
from jaxinfer.checkpoint.files import read_config
from jaxinfer.checkpoint.folder import Checkpoint
from jaxinfer.checkpoint.hub import resolve
from jaxinfer.checkpoint.load import load_params
from jaxinfer.checkpoint.open import open_weights
from jaxinfer.checkpoint.output import Format, check_destination
from jaxinfer.checkpoint.settle import as_stored
from jaxinfer.convert import stored_dtype, writing
from jaxinfer.engine.config import DType, check_options
from jaxinfer.layers.stack import Stream
from jaxinfer.models.causal import SmoothingPairs
from jaxinfer.models.model import AbstractModel, Params, scales
from jaxinfer.models.params import in_short
from jaxinfer.quantization.calibrate import Carrying, carrying, channel_factors, gptq, round_to_nearest, times
from jaxinfer.quantization.quantize import pack
from jaxinfer.quantization.schemes import SCHEMES, Scheme
from jaxinfer.sharding import local_devices
from jaxinfer.text.tokenizer import load_tokenizer

log = logging.getLogger("jaxinfer")

Host = np.ndarray[Any, Any]
Text = str | Sequence[Mapping[str, Any]]  # a plain one, or a conversation
Method = Literal["awq", "gptq", "smoothquant"]
BATCH = 512  # tokens that are run at once, unless a text is longer
SAMPLE = 2048  # tokens of which products are compared, for awq and smoothquant


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
    of all together `max_tokens`. An output head of its own, experts, and what no layer has, is rounded to the nearest.
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
        if experts := [name for name in target.quantized if len(target.params[name].shape) > 2]:
            log.warning("%s: rounded to the nearest: what each expert is given is not looked at", in_short(experts))
        if method != "gptq":
            layers.check_smoothing_pairs(str(config["model_type"]))
        with writing(output, format, target, config, folder) as add:
            rest = load_params(plain, checkpoint, device, only=layers.rest)
            add(_finished(target, {name: _rounded(target, name, value) for name, value in rest.items()}))
            hidden = layers.embed(rest)
            del rest
            for i, names in enumerate(tqdm(layers.names, desc="Layers", disable=None if show_progress else True)):
                params = load_params(plain, checkpoint, device, only=names)
                inputs, _ = layers.run(i, params, hidden, "hessian" if method == "gptq" else "sample")
                made = _quantize(target, layers, i, params, inputs, wanted, method)
                add(_finished(target, made))
                _, hidden = layers.run(i, {n: _value(v) for n, v in made.items()}, hidden, None)
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


class Layers:
    """A model that is run layer by layer on sequences of tokens, in batches. Activations are `[tokens, in]` of each."""

    def __init__(self, model: AbstractModel, device: jax.Device, sequences: Sequence[list[int]]) -> None:
        self.model = model
        packed = _packed(sequences)
        self.tokens = [sum(map(len, some)) for some in packed]
        length, rows = max(self.tokens), max(map(len, packed))
        filled = (some + [[]] * (rows - len(some)) for some in packed)  # so that one program is for all of them
        self.batches = [jax.device_put(ForwardBatch.of_sequences(some, length), device) for some in filled]
        matches = {name: re.match(r"(.*?\.\d+)\.", name) for name in model.abstract}
        prefixes = dict.fromkeys(part[1] for part in matches.values() if part)
        self.prefixes = sorted(prefixes, key=lambda prefix: int(prefix.rsplit(".", 1)[1]))
        self.names = [[name for name in matches if name.startswith(f"{prefix}.")] for prefix in self.prefixes]
        self.rest = [name for name, part in matches.items() if not part]
        self._program = jax.jit(self._run, static_argnums=(0, 1))
        self._firsts: dict[Any, dict[str, str]] = {}  # linears of a layer, and the first of those with the same input
        kinds = [type(block) for block in model.bind(model.abstract).blocks()]
        self.feeds: list[SmoothingPairs] = [getattr(kind, "SMOOTHING_PAIRS", ()) for kind in kinds]  # of each

    def check_smoothing_pairs(self, model_type: str) -> None:
        """Raises ValueError for an architecture whose layers don't say what feeds their linears."""
        if not all(self.feeds):
            raise ValueError(f"model_type {model_type!r} does not say which norms feed which linears: use method gptq")

    def embed(self, params: Params) -> list[Stream]:
        """What goes into the first layer, of each batch."""
        embed = jax.jit(lambda params, batch: self._bound(params).embed(batch))
        return [jax.tree.map(np.asarray, embed(params, batch)) for batch in self.batches]

    def run(
        self, layer: int, params: Mapping[str, Any], hidden: Sequence[Stream], kept: Literal["hessian", "sample"] | None
    ) -> tuple[dict[str, Host], list[Stream]]:
        """What goes into each of its linears, all batches together, and what comes out. kept: of what goes in,
        the sum of the outer products `[in, in]`, or every few tokens."""
        graph, state = nnx.split(self._bound(params).blocks()[layer])
        sums: dict[str, Any] = {}
        streams = []
        every = -(-sum(self.tokens) // SAMPLE)
        for tokens, batch, x in zip(self.tokens, self.batches, hidden, strict=True):
            out, inputs = self._program(graph, kept, state, x, batch)
            streams.append(jax.tree.map(np.asarray, out))
            for path, value in inputs.items():
                if kept == "hessian":
                    sums[path] = value if path not in sums else sums[path] + value
                else:
                    sums.setdefault(path, []).append(np.asarray(value)[:tokens:every])
        arrays = {
            path: np.concatenate(entry) if kept == "sample" else np.asarray(entry) for path, entry in sums.items()
        }
        return {path: arrays[first] for path, first in self._firsts.get(graph, {}).items() if arrays}, streams

    def _run(
        self, graph: Any, kept: str | None, state: Any, x: Stream, batch: ForwardBatch
    ) -> tuple[Stream, dict[str, jax.Array]]:
        """Of one layer on one batch. Layers that are alike have the same graph, and so one program."""
        block = nnx.merge(graph, state)
        taken: dict[str, jax.Array] = {}
        if kept:
            _record(block, taken)
        out, _ = self._bound({}).runner(batch)(block, x, None, batch)
        firsts: dict[int, str] = {}
        for path, value in taken.items():
            self._firsts.setdefault(graph, {})[path] = firsts.setdefault(id(value), path)
        real = jnp.arange(batch.tokens.shape[0])[:, None] < batch.cu_q_lens[-1]
        inputs = {path: jnp.where(real, taken[path], 0).astype(jnp.float32) for path in firsts.values()}
        if kept == "hessian":
            inputs = {path: jnp.matmul(x.T, x, precision="highest") for path, x in inputs.items()}
        return out, inputs

    def _bound(self, params: Mapping[str, Any]) -> Any:
        return self.model.bind({**self.model.abstract, **params})


def _record(block: Any, taken: dict[str, jax.Array]) -> None:
    for path, module in nnx.iter_modules(block):
        if hasattr(module, "observe"):
            module.observe = functools.partial(taken.__setitem__, ".".join(map(str, path)))


def _quantize(
    target: AbstractModel,
    layers: Layers,
    layer: int,
    params: Params,
    inputs: Mapping[str, Host],
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
                scale = channel_factors(read, inputs[paths[0]], scheme, shared)
                fold(weights, f"{prefix}.{source}", [f"{prefix}.{path}" for path in taking], scale, shared)
                factors |= dict.fromkeys(paths, scale)
    made: dict[str, Made] = {}
    carried: dict[int, Carrying] = {}  # of each input, which several linears may have
    for name, weight in weights.items():
        path = name.removeprefix(f"{prefix}.").removesuffix(".weight")
        if name not in target.quantized or path not in inputs:
            made[name] = _rounded(target, name, weight)
        elif method == "gptq":
            hessian = inputs[path]
            if id(hessian) not in carried:
                carried[id(hessian)] = carrying(hessian)
            made[name] = gptq(weight, carried[id(hessian)], scheme)
        else:
            size = np.mean(np.square(inputs[path]), axis=0) / factors.get(path, np.float32(1)) ** 2
            made[name] = round_to_nearest(weight, size, scheme)
    return made


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
    return round_to_nearest(host, np.ones(host.shape[-1], np.float32), target.quantized[name])


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


def _packed(sequences: Sequence[list[int]]) -> list[list[list[int]]]:
    """As many as fit, one after the other, into what is run at once."""
    most = max(BATCH, *map(len, sequences))
    batches: list[list[list[int]]] = []
    left = 0
    for ids in sequences:
        if len(ids) > left:
            batches.append([])
            left = most
        batches[-1].append(ids)
        left -= len(ids)
    return batches


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
