"""A model split over several devices says what it says on one."""

import functools
import itertools
import json
import math
import re
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxinfer import LLM, SamplingParams
from jaxinfer.models.model import AbstractModel
from jaxinfer.plan.collectives import collectives
from jaxinfer.sharding import AXES, LEAST_SPLIT
from tests.checkpoints import same_tokens

OPTIONS = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "page_size": 8}
GREEDY = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)


def meshes() -> list[str]:
    """All of more than one device that divide 8 devices and 4 heads."""
    sizes = [s for s in itertools.product((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4)) if 8 % math.prod(s) == 0]
    specs = [",".join(f"{axis}={n}" for axis, n in zip(AXES, s, strict=True) if n > 1) for s in sizes]
    return [spec for spec in specs if spec]


@pytest.fixture(scope="module")
def alone(checkpoints):
    """Log-probabilities of the last prompt, on one device."""

    @functools.cache
    def score(name):
        reference = checkpoints(name)
        with LLM(reference.folder, **OPTIONS) as llm:
            return llm.score([reference.prompts[-1]])[0].logprobs

    return score


SHAPES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")  # of attention: what differs over a mesh
FAST = {("llama", "tensor=4"), ("gpt2", "data=2,fsdp=2,tensor=2")}


OFTEN = ("fsdp=2,tensor=4", "data=2,fsdp=2,tensor=2")  # all axes, and heads that are there twice


def marks(name, mesh):
    """One on all meshes of all 8 devices, the others on two of them; the rest now and then."""
    if (name, mesh) in FAST:
        return ()
    whole = math.prod(map(int, re.findall(r"=(\d)", mesh))) == 8
    return pytest.mark.slow if mesh in OFTEN or (name == "llama" and whole) else pytest.mark.long


@pytest.mark.parametrize(
    ("name", "mesh"),
    [pytest.param(name, mesh, marks=marks(name, mesh)) for name in SHAPES for mesh in meshes()],
)
def test_the_same_logits_and_tokens(checkpoints, alone, name, mesh):
    """4 heads, and 2 key/value heads: on 4 devices each of these is there twice. 300 tokens and an MLP of 48 divide."""
    reference = checkpoints(name)
    with LLM(reference.folder, mesh=mesh, **OPTIONS) as llm:
        assert llm.description.endswith(mesh)
        prompt = reference.prompts[-1]
        (scored,) = llm.score([prompt])
        expected = jax.nn.log_softmax(reference.logits)[np.arange(len(prompt) - 1), prompt[1:]]
        np.testing.assert_allclose(scored.logprobs, expected, atol=2e-5)
        np.testing.assert_allclose(scored.logprobs, alone(name), atol=1e-5)
        if name != "llama" and (name, mesh) not in FAST:
            return  # the engine is the same, and compiling the rest of it as well takes long
        together = llm.generate(reference.prompts, GREEDY)
        for output, tokens, gaps in zip(together, reference.greedy, reference.gaps, strict=True):
            assert same_tokens(output.outputs[0].token_ids, tokens, gaps)


SPLIT = {**dict.fromkeys(("llama", "gpt2"), ()), "qwen3": pytest.mark.slow}


@pytest.mark.parametrize("name", [pytest.param(name, marks=mark) for name, mark in SPLIT.items()])
def test_tokens_split_between_products(checkpoints, alone, monkeypatch, name):
    """As they are on TPUs, where there are many: each layer's two sums are scattered, and gathered for products."""
    monkeypatch.setitem(LEAST_SPLIT, "cpu", 1)
    reference = checkpoints(name)
    with LLM(reference.folder, mesh="data=2,tensor=4", **OPTIONS) as llm:
        prompt, layers = reference.prompts[-1], llm.model.config.num_layers
        np.testing.assert_allclose(llm.score([prompt])[0].logprobs, alone(name), atol=1e-5)
        together = llm.generate(reference.prompts, GREEDY)
        for output, tokens, gaps in zip(together, reference.greedy, reference.gaps, strict=True):
            assert same_tokens(output.outputs[0].token_ids, tokens, gaps)
        texts = [program.as_text() for key, program in llm.engine.runner._executables.items() if key[0] == "forward"]
    assert texts
    for text in texts:
        found = {kind: total.count for kind, total in collectives(text).items()}
        assert found["reduce-scatter"] == 2 * layers
        assert found["all-gather"] >= 2 * layers
        assert found.get("all-reduce", 0) <= 2, "of embeddings"


WIDE = {
    "model_type": "llama",
    "vocab_size": 301,
    "hidden_size": 32,
    "intermediate_size": 50,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory, checkpoints):
    """8 heads, 2 key/value heads; 8 devices divide neither the vocabulary nor the MLP."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    folder.mkdir()
    model = AbstractModel.from_config(WIDE, "float32")
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(0, 0.1, s.shape).astype(np.float32) for name, s in model.abstract.items()}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(WIDE))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoints("llama").folder / file, folder)
    return folder


@pytest.fixture(scope="module")
def split(wide):
    with LLM(wide, mesh="tensor=8", **OPTIONS) as llm:
        yield llm


@pytest.fixture(scope="module")
def rows(wide):
    with LLM(wide, mesh="data=2,fsdp=2,tensor=2", **OPTIONS) as llm:
        yield llm


@pytest.mark.slow
@pytest.mark.parametrize("which", ["rows", "split"])
def test_eight_devices_and_what_does_not_divide(wide, which, request):
    split = request.getfixturevalue(which)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 300, n).tolist() for n in (3, 50, 21, 7, 90)]
    params = [
        GREEDY,
        SamplingParams(temperature=0.9, top_k=20, top_p=0.9, seed=1, max_tokens=20, logprobs=3),
        SamplingParams(temperature=0.0, repetition_penalty=1.3, max_tokens=20, logit_bias={300: 4.0}),
        SamplingParams(temperature=1.0, seed=3, allowed_token_ids=[1, 2, 299, 300], max_tokens=20),
        SamplingParams(temperature=0.7, min_p=0.05, seed=4, max_tokens=20, prompt_logprobs=2),
    ]
    with LLM(wide, **OPTIONS) as llm:
        alone, scored = llm.generate(prompts, params), llm.score(prompts)
    together = split.generate(prompts, params)
    for output, other in zip(together, alone, strict=True):
        assert output.outputs[0].token_ids == other.outputs[0].token_ids
        assert (output.outputs[0].logprobs is None) == (other.outputs[0].logprobs is None)
    for score, other in zip(split.score(prompts), scored, strict=True):
        np.testing.assert_allclose(score.logprobs, other.logprobs, atol=1e-5)


def test_sampling_from_parts_of_the_vocabulary(checkpoints):
    """4 divides the vocabulary of 300: no device ever has all logits. Draws, masks and penalties are the same."""
    rng = np.random.default_rng(2)
    prompts = [rng.integers(0, 300, n).tolist() for n in (9, 30, 14, 25)]
    params = [
        SamplingParams(temperature=0.9, top_k=20, top_p=0.9, seed=1, max_tokens=12, logprobs=3, ignore_eos=True),
        SamplingParams(temperature=0.8, repetition_penalty=1.3, presence_penalty=0.4, seed=2, max_tokens=12),
        SamplingParams(temperature=1.0, seed=3, allowed_token_ids=[1, 2, 150, 299], max_tokens=12),
        SamplingParams(temperature=0.7, min_p=0.05, seed=4, max_tokens=12, prompt_logprobs=2),
    ]
    results = []
    for mesh in (None, "tensor=4"):
        with LLM(checkpoints("llama").folder, mesh=mesh, **OPTIONS) as llm:
            outputs = llm.generate(prompts, params)
            results.append(
                ([o.outputs[0].token_ids for o in outputs], outputs[0].outputs[0].logprobs, llm.score(prompts))
            )
            slots = llm.engine.runner.state.slots
            assert slots.in_output.sharding.shard_shape(slots.in_output.shape)[1] == (75 if mesh else 300)
    (alone, ours, scores), (split, theirs, others) = results
    assert alone == split
    for step, other in zip(ours, theirs, strict=True):
        assert list(step) == list(other)
        assert [p.rank for p in step.values()] == [p.rank for p in other.values()]
    for score, other in zip(scores, others, strict=True):
        np.testing.assert_allclose(score.logprobs, other.logprobs, atol=1e-5)


def test_each_device_holds_its_part_and_no_more(split):
    runner = split.engine.runner
    shapes = {name: array.sharding.shard_shape(array.shape) for name, array in runner.params.items()}
    layer = "model.layers.0."
    assert shapes[f"{layer}self_attn.q_proj.weight"] == (4, 32)
    assert shapes[f"{layer}self_attn.k_proj.weight"] == (4, 32)  # 2 heads of 4: each is there 4 times, not 8
    assert shapes[f"{layer}mlp.up_proj.weight"] == (7, 32)
    assert shapes[f"{layer}mlp.down_proj.weight"] == (32, 7)
    assert shapes["lm_head.weight"] == (38, 32)
    for cache in jax.tree.leaves(runner.state.cache):
        assert cache.sharding.shard_shape(cache.shape)[1] == 1


def test_two_reductions_a_layer_and_no_gathered_weights(split):
    split.generate([[1, 2, 3]], SamplingParams(max_tokens=4))
    programs = {key: program.as_text() for key, program in split.engine.runner._executables.items()}
    wanted = {"forward": 2 * WIDE["num_hidden_layers"] + 1, "decode": 2 * WIDE["num_hidden_layers"] + 1, "sample": 0}
    assert {key[0] for key in programs} >= wanted.keys()
    for key, text in programs.items():
        if key[0] in wanted:
            reductions = len(re.findall(r"= \S+ all-reduce(?:-start)?\(", text))
            assert reductions == wanted[key[0]], (key, "two a layer, and one for the vocabulary's embeddings")
            gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather(?:-start)?\(", text)
            assert all(shape.endswith("304") for shape in gathered), gathered  # logits
    state = split.engine.runner.state
    assert all(len(array.sharding.device_set) == 8 for array in jax.tree.leaves(state))


def test_rows_and_weights_in_parts(rows):
    """Two shards of data, each with two of fsdp: four rows have a shard each, and a weight is in four parts."""
    runner = rows.engine.runner
    shapes = {name: array.sharding.shard_shape(array.shape) for name, array in runner.params.items()}
    layer = "model.layers.0."
    assert shapes[f"{layer}self_attn.q_proj.weight"] == (16, 16)
    assert shapes[f"{layer}mlp.down_proj.weight"] == (16, 25)
    assert shapes["lm_head.weight"] == (151, 16)
    assert shapes[f"{layer}input_layernorm.weight"] == (32,)
    whole, part = (runner.state.cache[0].k.shape, runner.state.cache[0].k.sharding.shard_shape)
    assert part(whole) == (whole[0] // 4, 1, *whole[2:])
    assert [shard.max_rows for shard in rows.engine.scheduler.shards] == [1] * 4
    outputs = rows.generate([[1, 2, 3]] * 9, SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True))
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1
    assert rows.stats.pages_used == 0


def test_each_part_is_read_once(wide, split):
    from jaxinfer.checkpoint.folder import Checkpoint
    from jaxinfer.checkpoint.load import load_params

    mesh = split.engine.runner.programs.mesh
    with Checkpoint(wide) as checkpoint:
        load_params(AbstractModel.from_config(WIDE, "float32"), checkpoint, mesh)
        assert checkpoint.bytes_read == checkpoint.nbytes


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("tensor=3", r"tensor=3 does not divide the model's 8 heads; tensor may be 1, 2, 4, 8$"),
        ("tensor=16", r"it needs 16 devices and there are 8; with them tensor may be 1, 2, 4, 8$"),
        ("tensor=0", "it must look like tensor=4 or data=2,tensor=4"),
        ("tensor", "it must look like tensor=4 or data=2,tensor=4"),
        ("tensor=2,tensor=2", "axis tensor is there twice"),
        ("model=2", "there is no axis 'model'; there are data, fsdp, tensor, expert$"),
        ("expert=2", "so many of its devices can't share experts; expert may be 1$"),
        ("data=4,tensor=2,expert=3", "so many of its devices can't share experts; expert may be 2, 4, 8$"),
        ("fsdp=2,tensor=2,expert=2", "so many of its devices can't share experts; expert may be 4$"),
        ("data=2,tensor=4,expert=4", "the model has no experts: leave expert=4 out$"),
        ("data=3,tensor=4", "it needs 12 devices and there are 8"),
        ("fsdp=3", "fsdp=3 does not divide the model's width of 32; fsdp may be 1, 2, 4, 8$"),
    ],
)
def test_meshes_that_can_not_be(wide, mesh, message):
    with pytest.raises(ValueError, match=f"^mesh is '{mesh}': .*{message}"):
        LLM(wide, mesh=mesh)


def test_one_device_is_no_mesh(wide):
    with LLM(wide, mesh="tensor=1") as llm:
        assert llm.engine.runner.programs.mesh is None
