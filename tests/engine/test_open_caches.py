"""Kinds of caches that the package does not have: a vector a token in pages, a state a sequence, and both beside keys
and values. A model of them, made here, goes through the engine as any other."""

import json
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from safetensors.numpy import save_file

from jaxinfer import LLM, SamplingParams
from jaxinfer.attention import AttentionSpec, attend
from jaxinfer.cache import (
    FullAttentionSpec,
    KVCacheSpec,
    gather_latents,
    read_state,
    write_latents,
    write_state,
)
from jaxinfer.layers.linear import Embedding, Linear, head_logits
from jaxinfer.models.causal import CausalLM
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.model import Model
from jaxinfer.models.registry import REGISTRY, Architecture, Entry
from jaxinfer.models.weights import WeightMap
from tests.engine.reference import all_logits, same

WIDTH, LENGTH, NEW = 16, 128, 24
OPTIONS = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "page_size": 4, "max_model_len": LENGTH}


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

    def __init__(self, linear, window):
        self.down, self.out = linear(), linear()
        self.cache_spec = Vectors(WIDTH, window)

    def __call__(self, x, cache, batch):
        new, window = self.down(x), self.cache_spec.window or 10**6
        if cache is None:
            keys, at = new[None], batch.positions[None]
            seen = batch.row[:, None] == batch.row[None]
            seen &= jnp.arange(len(x), dtype=jnp.int32)[None] < batch.q_start[-1]
        else:
            page, place = batch.places(cache.shape[1])
            cache = write_latents(cache, new, page, place)
            keys = gather_latents(cache, batch.pages)[batch.row]
            at = jnp.arange(keys.shape[1], dtype=jnp.int32)[None]
            seen = at < batch.kv_len[batch.row][:, None]
        distance = batch.positions[:, None] - at
        scores = jnp.where(seen & (distance >= 0) & (distance < window), jnp.sum(keys * new[:, None], -1), -1e30)
        keys = jnp.where((scores > -1e30)[..., None], keys, 0)
        return self.out(jnp.sum(jax.nn.softmax(scores, -1)[..., None] * keys, axis=1)), cache


class SumMixer(nnx.Module):
    """Each token adds itself to what is left of those before."""

    def __init__(self, linear):
        self.into, self.out = linear(), linear()
        self.cache_spec = Sum(WIDTH)

    def __call__(self, x, cache, batch):
        rows = batch.kv_len.shape[0]
        states = {"sum": jnp.zeros((rows, WIDTH), jnp.float32)}
        if cache is not None:
            states = read_state(cache, batch.slots, batch.kv_len == jnp.diff(batch.q_start))

        def step(state, token):
            row, new, live = token
            state = state.at[row].set(jnp.where(live, 0.8 * state[row] + new, state[row]))
            return state, state[row]

        live = jnp.arange(len(x), dtype=jnp.int32) < batch.q_start[-1]
        after, outs = lax.scan(step, states["sum"], (batch.row, self.into(x), live))
        if cache is not None:
            cache = write_state(cache, batch.slots, {"sum": after}, batch.kv_len > 0)
        return self.out(outs.astype(x.dtype)), cache


class HeadMixer(nnx.Module):
    """Keys and values of two heads."""

    def __init__(self, linear):
        self.q, self.k, self.v, self.out = linear(), linear(), linear(), linear()
        self.cache_spec = FullAttentionSpec(2, WIDTH // 2)

    def __call__(self, x, cache, batch):
        q, k, v = (part(x).reshape(len(x), 2, -1) for part in (self.q, self.k, self.v))
        out, cache = attend(q, k, v, cache, batch, AttentionSpec(0.5))
        return self.out(out.reshape(x.shape)), cache


class Block(nnx.Module):
    def __init__(self, kind, linear):
        name, _, window = kind.partition(" ")
        made = {"sum": SumMixer, "heads": HeadMixer, "latent": lambda make: LatentMixer(make, int(window or 0) or None)}
        self.mixer = made[name](linear) if name != "nothing" else None
        self.mlp = linear()

    def __call__(self, x, cache, batch):
        if self.mixer is not None:
            mixed, cache = self.mixer(x, cache, batch)
            x = x + mixed
        return x + jnp.tanh(self.mlp(x)), cache


@dataclass(frozen=True)
class ToyConfig(ModelConfig):
    kinds: tuple[str, ...]


class Toy(CausalLM):
    def __init__(self, config, *, dtype, rngs):
        def linear():
            return Linear(WIDTH, WIDTH, axes=(None, None), bias=False, dtype=dtype, rngs=rngs)

        self.table = Embedding(config.vocab_size, WIDTH, dtype=dtype, rngs=rngs)
        self.blocks_ = nnx.List([Block(kind, linear) for kind in config.kinds])

    def embed(self, batch):
        return self.table(batch.tokens, batch.mesh)

    def blocks(self):
        return list(self.blocks_)

    def runner(self, batch):
        return lambda block, x, cache, view: block(x, cache, view)

    def logits(self, x, mesh=None):
        return head_logits(x, self.table, mesh)


def parse(fields):
    kinds = tuple(fields.data["kinds"])
    return ToyConfig(300, WIDTH, len(kinds), 2, 2, WIDTH // 2, 1024, True, kinds)


ARCHITECTURE = Architecture(parse, Toy, lambda config: WeightMap())


@pytest.fixture
def toy(monkeypatch, tmp_path):
    monkeypatch.setitem(REGISTRY, "Toy", Entry("toy", ARCHITECTURE, "a toy"))

    def make(*kinds):
        config = {"model_type": "toy", "kinds": kinds, "vocab_size": 300}
        (tmp_path / "config.json").write_text(json.dumps(config))
        params = Model.from_config(config, "float32").random_params()
        rng = np.random.default_rng(0)
        save_file(
            {n: rng.normal(0, 0.25, p.shape).astype(np.float32) for n, p in params.items()},
            tmp_path / "model.safetensors",
        )
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("kinds", "pools", "hits"),
    [
        (["latent", "latent 20"], 1, True),
        (["sum", "sum"], 0, False),
        (["latent", "heads", "nothing", "sum", "heads"], 2, False),
    ],
    ids=["latents", "sums", "all"],
)
@pytest.mark.parametrize("mesh", [None, pytest.param("data=2", marks=pytest.mark.slow)])
def test_through_the_engine(toy, kinds, pools, hits, mesh):
    folder = toy(*kinds)
    rng = np.random.default_rng(1)
    shared = rng.integers(0, 300, 60).tolist()
    prompts = [shared[: 12 * i] + rng.integers(0, 300, 1 + 5 * i).tolist() for i in range(6)]
    params = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)
    with LLM(folder, skip_tokenizer_init=True, mesh=mesh, **OPTIONS) as llm:
        layout = llm.engine.runner.programs.layout
        assert len(layout.pools) == pools
        assert sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(llm.engine.runner.state.cache)) == (
            llm.sizes.bytes * (2 if mesh else 1)
        )
        for _ in range(2):
            outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
            for prompt, output in zip(prompts, outputs, strict=True):
                tokens = output.outputs[0].token_ids
                values = all_logits(llm, prompt + tokens, LENGTH)[len(prompt) - 1 : -1]
                gaps = np.diff(np.sort(values, axis=-1)[:, -2:], axis=-1)[:, 0]
                assert same(tokens, values.argmax(axis=-1).tolist(), gaps)
        assert (llm.stats.hit_tokens > 0) == hits
        assert llm.stats.pages_used == 0


def test_a_dtype_that_it_can_not_have(toy):
    with pytest.raises(ValueError, match="kv_cache_dtype is 'int8': what this model keeps can't be in it"):
        LLM(toy("latent"), skip_tokenizer_init=True, kv_cache_dtype="int8")
