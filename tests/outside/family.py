"""A family of models from outside of the package: layers that keep a vector a token, a state a sequence, keys and
values, or nothing; and experts, of which a checkpoint has the matrices one by one. No line of the package knows it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from safetensors.numpy import save_file

from jaxinfer.attention import AttentionSpec, attend
from jaxinfer.cache import (
    FullAttentionSpec,
    KVCacheSpec,
    gather_latents,
    read_state,
    write_latents,
    write_state,
)
from jaxinfer.layers.linear import Embedding, Linear, head_logits, parameter
from jaxinfer.layers.norm import RMSNorm
from jaxinfer.models.causal import CausalLM
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.model import AbstractModel
from jaxinfer.models.registry import Architecture
from jaxinfer.models.sources import Source, Stack, Tensor
from jaxinfer.models.weights import ParamMapping
from jaxinfer.weights import dot
from tests.checkpoints import write_tokenizer

VOCAB, WIDTH, INNER, EXPERTS, CONTEXT = 300, 64, 96, 3, 1024


@dataclass(frozen=True)
class Vectors(KVCacheSpec):
    """A vector a token, of the last `window`."""

    width: int
    window: int | None = None

    def init_cache(self, dtype, count, page_size):
        return jax.ShapeDtypeStruct((count, page_size, self.width), dtype)


@dataclass(frozen=True)
class Sum(KVCacheSpec):
    """A vector a sequence."""

    paged: ClassVar[bool] = False
    width: int

    def init_cache(self, dtype, count, page_size):
        return {"sum": jax.ShapeDtypeStruct((count, self.width), jnp.dtype("float32"))}


class LatentMixer(nnx.Module):
    """Each token takes the softmax of what is like it."""

    def __init__(self, window, **options):
        self.down = Linear(WIDTH, WIDTH, axes=(None, "embed"), **options)
        self.out = Linear(WIDTH, WIDTH, axes=("embed", None), **options)
        self.cache_spec = Vectors(WIDTH, window)

    def __call__(self, x, cache, batch):
        new, window = self.down(x), self.cache_spec.window or 10**6
        if cache is None:
            keys, at = new[None], batch.positions[None]
            seen = batch.segment_ids[:, None] == batch.segment_ids[None]
            seen &= jnp.arange(len(x), dtype=jnp.int32)[None] < batch.cu_q_lens[-1]
        else:
            page, offset = batch.slot_mapping(cache.shape[1])
            cache = write_latents(cache, new, page, offset)
            keys = gather_latents(cache, batch.pages)[batch.segment_ids]
            at = jnp.arange(keys.shape[1], dtype=jnp.int32)[None]
            seen = at < batch.kv_lens[batch.segment_ids][:, None]
        distance = batch.positions[:, None] - at
        scores = jnp.sum(keys * new[:, None], -1) * WIDTH**-0.5
        scores = jnp.where(seen & (distance >= 0) & (distance < window), scores, -1e30)
        keys = jnp.where((scores > -1e30)[..., None], keys, 0)
        return self.out(jnp.sum(jax.nn.softmax(scores, -1)[..., None] * keys, axis=1)), cache


class SumMixer(nnx.Module):
    """Each token adds itself to what is left of those before."""

    def __init__(self, **options):
        self.into = Linear(WIDTH, WIDTH, axes=(None, "embed"), **options)
        self.out = Linear(WIDTH, WIDTH, axes=("embed", None), **options)
        self.cache_spec = Sum(WIDTH)

    def __call__(self, x, cache, batch):
        states = {"sum": jnp.zeros((batch.kv_lens.shape[0], WIDTH), jnp.float32)}
        if cache is not None:
            states = read_state(cache, batch.slots, batch.kv_lens == jnp.diff(batch.cu_q_lens))

        def step(state, token):
            row, new, live = token
            state = state.at[row].set(jnp.where(live, 0.8 * state[row] + new, state[row]))
            return state, state[row]

        live = jnp.arange(len(x), dtype=jnp.int32) < batch.cu_q_lens[-1]
        after, outs = lax.scan(step, states["sum"], (batch.segment_ids, self.into(x).astype(jnp.float32), live))
        if cache is not None:
            cache = write_state(cache, batch.slots, {"sum": after}, batch.kv_lens > 0)
        return self.out(outs.astype(x.dtype)), cache


class HeadMixer(nnx.Module):
    """Keys and values of two heads."""

    def __init__(self, **options):
        self.q = Linear(WIDTH, WIDTH, axes=("heads", "embed"), **options)
        self.k, self.v = (Linear(WIDTH, WIDTH, axes=("kv_heads", "embed"), **options) for _ in range(2))
        self.out = Linear(WIDTH, WIDTH, axes=("embed", "heads"), **options)
        self.cache_spec = FullAttentionSpec(2, WIDTH // 2)

    def __call__(self, x, cache, batch):
        q, k, v = (part(x).reshape(len(x), 2, -1) for part in (self.q, self.k, self.v))
        out, cache = attend(q, k, v, cache, batch, AttentionSpec((WIDTH // 2) ** -0.5))
        return self.out(out.reshape(x.shape)), cache


class Experts(nnx.Module):
    """A router's sum of all of them: a toy grouped product, over weights of three axes."""

    def __init__(self, *, dtype, rngs):
        self.router = Linear(WIDTH, EXPERTS, axes=(None, "embed"), dtype=dtype, rngs=rngs)
        self.up = parameter((EXPERTS, INNER, WIDTH), (None, "mlp", "embed"), dtype, rngs)
        self.down = parameter((EXPERTS, WIDTH, INNER), (None, "embed", "mlp"), dtype, rngs)

    def __call__(self, x):
        shares = jax.nn.softmax(self.router(x).astype(jnp.float32), axis=-1)
        up, down = self.up.get_value(), self.down.get_value()
        outs = [dot(jnp.tanh(dot(x, up[i])), down[i], "float32") * shares[:, i : i + 1] for i in range(EXPERTS)]
        return sum(outs).astype(x.dtype)


class Block(nnx.Module):
    """A mixer, then experts, each behind a norm and added."""

    SMOOTHING_PAIRS = (("norm_2", ("experts.router",)),)

    def __init__(self, kind, **options):
        name, _, window = kind.partition(" ")
        self.norm_1, self.norm_2 = (RMSNorm(WIDTH, eps=1e-6, dtype=options["dtype"]) for _ in range(2))
        if name == "latent":
            self.mixer = LatentMixer(int(window or 0) or None, **options)
        elif name in ("sum", "heads"):
            self.mixer = {"sum": SumMixer, "heads": HeadMixer}[name](**options)
        else:
            self.mixer = None
        self.experts = Experts(**options)

    def __call__(self, x, cache, batch):
        if self.mixer is not None:
            mixed, cache = self.mixer(self.norm_1(x), cache, batch)
            x = x + mixed
        return x + self.experts(self.norm_2(x)), cache


@dataclass(frozen=True)
class Config(ModelConfig):
    """Which kinds its layers are of."""

    kinds: tuple[str, ...]


class Outsider(CausalLM):
    """The model, with a tied head."""

    def __init__(self, config, **options):
        self.table = Embedding(config.vocab_size, WIDTH, **options)
        self.layers = nnx.List([Block(kind, **options) for kind in config.kinds])
        self.norm = RMSNorm(WIDTH, eps=1e-6, dtype=options["dtype"])

    def embed(self, batch):
        return self.table(batch.tokens, batch.mesh)

    def blocks(self):
        return list(self.layers)

    def runner(self, batch):
        return lambda block, x, cache, view: block(x, cache, view)

    def logits(self, x, mesh=None):
        return head_logits(self.norm(x), self.table, mesh)


def parse(fields) -> Config:
    kinds = tuple(fields.data["kinds"])
    return Config(VOCAB, WIDTH, len(kinds), 2, 2, WIDTH // 2, CONTEXT, True, kinds)


def source(name: str) -> Source:
    """Experts are stored one by one."""
    if name.endswith((".experts.up", ".experts.down")):
        layer, _, which = name.rpartition(".")
        return Stack(tuple(Tensor(f"{layer}.{i}.{which}.weight") for i in range(EXPERTS)))
    return Tensor(name)


def weights(config: Config) -> ParamMapping:
    return ParamMapping(source, prefix="", embedding="table.weight")


ARCHITECTURE = Architecture(parse, Outsider, weights)
NAME, TYPE = "OutsiderForCausalLM", "outsider"


def write(folder: Path, *kinds: str) -> Path:
    """A checkpoint of random weights, its norms' too."""
    config: dict[str, Any] = {"model_type": TYPE, "architectures": [NAME], "kinds": kinds, "vocab_size": VOCAB}
    rng = np.random.default_rng(0)
    tensors = {}
    for name, spec in AbstractModel.from_config(config, "float32").params.items():
        for tensor, shape in spec.source.tensors(spec.shape).items():
            tensors[tensor] = (rng.normal(0, 0.25, shape) + ("norm" in name)).astype(np.float32)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    write_tokenizer(folder)
    return folder
