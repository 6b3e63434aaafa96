"""Experts through the engine: in pieces, beside rows that decode, preempted, found again, and split over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import LLM, SamplingParams
from jaxinfer.attention import ForwardBatch
from jaxinfer.layers import experts as layer
from jaxinfer.plan.collectives import collectives
from jaxinfer.sharding import parse_mesh
from jaxinfer.weights import grouped_dots
from tests.engine.reference import all_logits, same
from tests.plain import random_tensors, write_checkpoint

CONFIG = {
    "model_type": "qwen3_moe",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 11,  # which no mesh divides
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
OPTIONS = {"max_num_seqs": 8, "max_num_batched_tokens": 32, "page_size": 8, "max_model_len": 128}
GREEDY = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
RNG = np.random.default_rng(2)
SHARED = RNG.integers(0, 250, 50).tolist()
PROMPTS = [SHARED[: 10 * i] + RNG.integers(0, 250, 1 + 5 * i).tolist() for i in range(6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tensors = {name: 3 * tensor for name, tensor in random_tensors(CONFIG).items()}
    return write_checkpoint(tmp_path_factory.mktemp("experts") / "model", CONFIG, tensors)


@pytest.fixture(scope="module")
def expected(folder):
    """Of each prompt the tokens, and how far apart the two best logits were."""
    with LLM(folder, **OPTIONS) as llm:
        found = []
        for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False):
            tokens = output.outputs[0].token_ids
            values = all_logits(llm, output.prompt_token_ids + tokens, 128)[len(output.prompt_token_ids) - 1 : -1]
            gaps = np.diff(np.sort(values, axis=-1)[:, -2:], axis=-1)[:, 0]
            assert same(tokens, values.argmax(axis=-1).tolist(), gaps)
            found.append((tokens, gaps))
        return found


def check(llm, expected):
    for output, (tokens, gaps) in zip(llm.generate(PROMPTS, GREEDY, use_tqdm=False), expected, strict=True):
        assert same(output.outputs[0].token_ids, tokens, gaps)


def test_preempted_and_found_again(folder, expected):
    with LLM(folder, kv_cache_memory=60 * 1024, **OPTIONS) as llm:
        check(llm, expected)
        assert llm.stats.preemptions > 0
    with LLM(folder, **OPTIONS) as llm:
        for _ in range(2):
            check(llm, expected)
        assert llm.stats.hit_tokens > 0


MESHES = {"tensor=8": 8, "data=2,tensor=4": 8, "fsdp=2,tensor=4": 8, "data=2,tensor=4,expert=4": 4, "data=8": 8}


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "devices"), MESHES.items())
def test_over_a_mesh(folder, expected, mesh, devices):
    """The same tokens. Each device has its own experts and no more, whatever else splits weights; a layer has two
    reductions as with an MLP, and where shards of rows share experts tokens go there and back once."""
    with LLM(folder, mesh=mesh, **OPTIONS) as llm:
        check(llm, expected)
        assert llm.description.endswith(mesh)
        params = llm.engine.runner.params
        weight = params["model.layers.0.mlp.experts.gate_proj.weight"]
        assert weight.sharding.shard_shape(weight.shape) == (-(-11 // devices), 24, 32)
        sizes = parse_mesh(mesh)
        layers = CONFIG["num_hidden_layers"]
        shared = layers * (devices > sizes["tensor"])
        for key, program in llm.engine.runner._executables.items():
            if key[0] == "forward" and sizes["tensor"] > 1 and sizes["fsdp"] == 1:
                found = {kind: total.count for kind, total in collectives(program.as_text()).items()}
                gathered = found.pop("all-gather", 0)
                assert found == {"all-reduce": 2 * layers + 1} | ({"reduce-scatter": shared} if shared else {})
                print(mesh, key, found, gathered)


def forward(folder, monkeypatch, tokens, length, router=None):
    """Logits of tokens in a stream of this length, and the rows of each expert in each layer. router: all that the
    router's weight is, instead of its own."""
    seen, real = [], grouped_dots

    def watched(x, sizes, weights, out_dtype=None):
        jax.debug.callback(lambda sizes: seen.append(sizes.tolist()), sizes)
        return real(x, sizes, weights, out_dtype)

    monkeypatch.setattr(layer, "grouped_dots", watched)
    with LLM(folder, **OPTIONS) as llm:
        params = dict(llm.engine.runner.params)
        if router is not None:
            params |= {name: router(value) for name, value in params.items() if name.endswith("mlp.gate.weight")}
        batch = ForwardBatch.of_sequences([tokens], length)
        logits = jax.jit(lambda params, batch: llm.model.bind(params)(batch, None)[0])(params, batch)
        jax.effects_barrier()
    return np.asarray(logits)[: len(tokens)], seen


def test_padding_goes_to_no_expert(folder, monkeypatch):
    alone, sizes = forward(folder, monkeypatch, SHARED, len(SHARED))
    padded, others = forward(folder, monkeypatch, SHARED, len(SHARED) + 30)
    assert sorted(sizes) == sorted(others)
    assert len(sizes) == 4  # two products a layer
    assert all(sum(rows) == 3 * len(SHARED) for rows in sizes)
    np.testing.assert_allclose(padded, alone, atol=1e-3)


def test_all_tokens_to_the_same_experts(folder, monkeypatch):
    """Equal logits: the first three of eleven have all tokens, and nothing is dropped."""
    logits, sizes = forward(folder, monkeypatch, SHARED, len(SHARED), jnp.zeros_like)
    assert all(rows == [len(SHARED)] * 3 + [0] * 8 for rows in sizes)
    assert np.isfinite(logits).all()
    apart = np.concatenate(
        [forward(folder, monkeypatch, SHARED[: i + 1], i + 1, jnp.zeros_like)[0][-1:] for i in (0, 49)]
    )
    np.testing.assert_allclose(logits[[0, 49]], apart, atol=1e-4)
