"""The programs of models that keep no cache: a packed call of whole texts to a row of numbers of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from jaxinfer.attention import ForwardBatch
from jaxinfer.engine.buckets import Buckets, powers
from jaxinfer.engine.programs import Function, Key, ModelPrograms, Program, State
from jaxinfer.engine.programs.adapters import NO_ADAPTERS
from jaxinfer.layers.pooling import pool
from jaxinfer.layers.vectors import Step
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.model import Params
from jaxinfer.sharding import ROWS
from jaxinfer.weights import Axes

# Of the smallest call: what is less is summed in another order, and a text's numbers would depend on its company.
# Products take another path for fewer tokens, and XLA sums arrays of fewer elements otherwise.
LEAST_TOKENS, LEAST_ELEMENTS = 16, 4096
TOKENS_A_ROW = 4  # texts are rarely shorter, on the average of a call


def sizes_of(config: ModelConfig, budget: int, longest: int) -> tuple[int, ...]:
    """Tokens of calls, in ascending order: up to the budget, and beyond it for texts that are longer."""
    narrowest = min(config.hidden_size, config.num_kv_heads * config.head_dim)
    smallest = max(LEAST_TOKENS, -(-LEAST_ELEMENTS // narrowest))
    usual = powers(smallest, max(budget, smallest), 2)
    return usual if longest <= usual[-1] else (*usual, *powers(2 * usual[-1], longest, 2))


@dataclass(frozen=True)
class Pooler:
    """How the hidden states of a text's tokens become its vector.

    kinds: names in POOLINGS.
    steps: what comes after that.
    skips: the first tokens of a text may take no part.
    """

    kinds: tuple[str, ...]
    steps: tuple[Step, ...] = ()
    skips: bool = False

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The weights of all steps, by name."""
        return {_name(i, name): shape for i, step in enumerate(self.steps) for name, shape in step.shapes.items()}

    def __call__(self, x: jax.Array, batch: ForwardBatch, skip: jax.Array | None, params: Params) -> jax.Array:
        """Vectors float32 `[R, out]` of hidden states `[T, D]`."""
        vectors = pool(x, batch, self.kinds, skip)
        for i, step in enumerate(self.steps):
            vectors = step(vectors, {name: params[_name(i, name)] for name in step.shapes})
        return vectors


def _name(step: int, name: str) -> str:
    return f"pooler.{step}.{name}"


@dataclass(frozen=True)
class PoolingPrograms(ModelPrograms):
    """Two for each size of calls: what comes of texts, and what of their tokens.

    sizes: tokens of calls, in ascending order.
    pooler: what makes vectors; None: the model's head makes classes.
    budget: tokens of a call, on each shard of rows.
    max_model_len: tokens of a text, unless somebody takes longer ones.
    of_tokens: it is tokens of which numbers are wanted, unless somebody asks for texts.
    """

    sizes: tuple[int, ...]
    pooler: Pooler | None
    budget: int
    max_model_len: int
    of_tokens: bool = False

    def rows(self, size: int) -> int:
        """Texts of a call of so many tokens."""
        return max(self.sizes[0], size // TOKENS_A_ROW)

    @cached_property
    def table(self) -> Mapping[Key, Program[Any]]:
        programs = [kind(self, size) for kind in (PoolTexts, PoolTokens) for size in self.sizes]
        return {program.key: program for program in programs}

    def keys(self) -> list[Key]:
        """Of those that are usual."""
        most = max(self.budget, self.max_model_len)
        largest = Buckets.fit(self.sizes, min(most, self.sizes[-1]))
        return self.keys_up_to((PoolTokens if self.of_tokens else PoolTexts).kind, largest)

    def keys_up_to(self, kind: str, size: int) -> list[Key]:
        """Of programs of a kind, for calls of up to so many tokens."""
        return [key for key in self.table if key[0] == kind and key[1] <= size]

    @property
    def facts(self) -> dict[str, Any]:
        return {"pooler": str(self.pooler)}

    @property
    def options(self) -> dict[str, Any]:
        nothing = {"max_num_seqs": None, "page_size": None, "attention": "auto", "kv_cache_dtype": "auto"}
        tokens = {"max_model_len": self.max_model_len, "max_num_batched_tokens": self.budget * self.shards}
        return super().options | tokens | nothing | NO_ADAPTERS.options

    @cached_property
    def params(self) -> dict[str, jax.ShapeDtypeStruct]:
        steps = {} if self.pooler is None else self.pooler.shapes
        own = {name: jax.ShapeDtypeStruct(shape, np.float32, sharding=self.whole) for name, shape in steps.items()}
        return super().params | own

    @cached_property
    def axes(self) -> Mapping[str, Axes]:
        """Those after the pooling are whole on every device."""
        return {name: self.model.axes.get(name, (None,) * len(array.shape)) for name, array in self.params.items()}


class PoolTexts(Program[PoolingPrograms]):
    """Whole texts of up to `size` tokens, through all layers, to a row of numbers each."""

    kind = "pool"

    @property
    def inputs(self) -> tuple[object, ...]:
        ints, rows = self.shapes.ints, self.shapes.rows(self.size)
        token, row = ints(self.size), ints(rows)
        batch = ForwardBatch(token, token, token, ints(rows + 1), row, (), ints(3), token_types=token)
        return (batch, row) if self.shapes.pooler is not None and self.shapes.pooler.skips else (batch,)

    @property
    def result(self) -> int:
        return 0

    def function(self) -> Function:
        model, pooler, mesh = self.shapes.model, self.shapes.pooler, self.shapes.mesh
        kind = self.shapes.devices[0].device_kind

        def pool_texts(
            params: Params, _: State, read: State, batch: ForwardBatch, skip: jax.Array | None = None
        ) -> tuple[jax.Array, State]:
            batch = dataclasses.replace(batch, mesh=mesh, device_kind=kind)
            module = model.bind(params)
            x = module.encode(batch)
            return module.classify(x, batch) if pooler is None else pooler(x, batch, skip, params), State()

        return self.over_rows(pool_texts, (PartitionSpec(ROWS),) * len(self.inputs), PartitionSpec(ROWS))


class PoolTokens(PoolTexts):
    """The same to a row of numbers of each token: its hidden state, or its logits of classes."""

    kind = "tokens"

    @property
    def inputs(self) -> tuple[object, ...]:
        return super().inputs[:1]

    def function(self) -> Function:
        model, pooler, mesh = self.shapes.model, self.shapes.pooler, self.shapes.mesh
        kind = self.shapes.devices[0].device_kind

        def pool_tokens(params: Params, _: State, read: State, batch: ForwardBatch) -> tuple[jax.Array, State]:
            module = model.bind(params)
            x = module.encode(dataclasses.replace(batch, mesh=mesh, device_kind=kind))
            return (module.classify_tokens(x) if pooler is None else x.astype("float32")), State()

        return self.over_rows(pool_tokens, (PartitionSpec(ROWS),), PartitionSpec(ROWS))
