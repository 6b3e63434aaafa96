"""A model that is run layer by layer, and what goes into its linears meanwhile: for quantizing by it."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxinfer.attention import ForwardBatch
from jaxinfer.layers.stack import Stream
from jaxinfer.models.causal import SmoothingPairs
from jaxinfer.models.model import AbstractModel, Params

Host = np.ndarray[Any, Any]
BATCH = 512  # tokens that are run at once, unless a text is longer
SAMPLE = 2048  # tokens of which products are compared, for awq and smoothquant
FEW = 32  # tokens: what fewer went to is not quantized by them


class Given:
    """What a linear was given, or each of a stack of E.

    tokens: how many, `[E]`.
    moments: f32, sums of outer products `[E, in, in]`, or of squares `[E, in]`.
    sample: every few tokens `[tokens, in]`, for awq and smoothquant; of a stack none.
    """

    def __init__(self) -> None:
        self.tokens: Host = np.zeros(1, np.int64)
        self.moments: Any = 0
        self.samples: list[Host] = []

    @property
    def sample(self) -> Host:
        return np.concatenate(self.samples)

    @property
    def few(self) -> int:
        """Of how many too little is known."""
        return int(np.sum(self.tokens < FEW))

    def add(self, x: Host, sizes: Host, outer: bool) -> None:
        """Rows `x [T, in]` that those of a stack were given, one after the other."""
        if np.ndim(self.moments) == 0:
            width = x.shape[1]
            self.moments = np.zeros((len(sizes), *(width,) * (1 + outer)), np.float32)
        self.tokens = self.tokens + sizes
        ends = np.cumsum(sizes)
        for moments, start, end in zip(self.moments, ends - sizes, ends, strict=True):
            rows = x[start:end]
            moments += rows.T @ rows if outer else np.sum(np.square(rows), axis=0)


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
    ) -> tuple[dict[str, Given], list[Stream]]:
        """What goes into each of its linears, all batches together, and what comes out. kept: of what goes in,
        the sum of the outer products, or every few tokens."""
        graph, state = nnx.split(self._bound(params).blocks()[layer])
        given: dict[str, Given] = {}
        streams = []
        every = -(-sum(self.tokens) // SAMPLE)
        for tokens, batch, x in zip(self.tokens, self.batches, hidden, strict=True):
            out, inputs = self._program(graph, kept, state, x, batch)
            streams.append(jax.tree.map(np.asarray, out))
            for path, (value, sizes) in inputs.items():
                seen = given.setdefault(path, Given())
                if sizes is not None:
                    seen.add(np.asarray(value), np.asarray(sizes), kept == "hessian")
                elif kept == "hessian":
                    seen.tokens, seen.moments = seen.tokens + tokens, seen.moments + value
                else:
                    seen.samples.append(np.asarray(value)[:tokens:every])
                    seen.add(seen.samples[-1], np.array([len(seen.samples[-1])]), False)
        for seen in given.values():
            seen.moments = np.asarray(seen.moments)
        return {path: given[first] for path, first in self._firsts.get(graph, {}).items() if given}, streams

    def _run(
        self, graph: Any, kept: str | None, state: Any, x: Stream, batch: ForwardBatch
    ) -> tuple[Stream, dict[str, tuple[jax.Array, jax.Array | None]]]:
        """Of one layer on one batch. Layers that are alike have the same graph, and so one program."""
        block = nnx.merge(graph, state)
        taken: dict[str, tuple[jax.Array, ...]] = {}
        if kept:
            _record(block, taken)
        out, _ = self._bound({}).runner(batch)(block, x, None, batch)
        firsts: dict[int, str] = {}
        for path, (value, *_) in taken.items():
            self._firsts.setdefault(graph, {})[path] = firsts.setdefault(id(value), path)
        real = jnp.arange(batch.tokens.shape[0])[:, None] < batch.cu_q_lens[-1]
        inputs: dict[str, tuple[jax.Array, jax.Array | None]] = {}
        for path in firsts.values():
            value, *sizes = taken[path]
            value = value.astype(jnp.float32)
            if not sizes:
                value = jnp.where(real, value, 0)
                value = jnp.matmul(value.T, value, precision="highest")[None] if kept == "hessian" else value
            inputs[path] = value, sizes[0] if sizes else None
        return out, inputs

    def _bound(self, params: Mapping[str, Any]) -> Any:
        return self.model.bind({**self.model.abstract, **params})


def _record(block: Any, taken: dict[str, tuple[jax.Array, ...]]) -> None:
    def note(path: str, *given: jax.Array) -> None:
        taken[path] = given

    for path, module in nnx.iter_modules(block):
        if hasattr(module, "observe"):
            module.observe = functools.partial(note, ".".join(map(str, path)))


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
