"""Models whose layers keep a state of a sequence, through the engine: what they decode, however calls are made up, is
what a forward over the whole sequence says."""

from dataclasses import replace

import numpy as np
import pytest

from jaxinfer import LLM, SamplingParams
from jaxinfer.kernels import cpu
from jaxinfer.plan.fit import fit, model_of
from jaxinfer.plan.targets import find_target
from tests.engine.reference import all_logits, same
from tests.kernels.test_cpu import needs_them
from tests.plain import random_tensors, write_checkpoint
from tests.refusals import line, refusal

DELTA_NETS = {
    "model_type": "qwen3_5_text",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "max_position_embeddings": 2048,
}
ALONE = {
    "model_type": "mamba",
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "state_size": 6,
    "tie_word_embeddings": True,
}
BESIDE = {
    "model_type": "falcon_h1",
    **{
        name: DELTA_NETS[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings")
    },
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_state": 6,
    "mamba_rms_norm": True,
}
LENGTH = 256
OPTIONS = {"max_num_seqs": 4, "max_num_batched_tokens": 96, "page_size": 8, "max_model_len": LENGTH, "dtype": "float32"}
GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
RNG = np.random.default_rng(4)
# One, two and three chunks, and a token more and less.
PROMPTS = [RNG.integers(0, 256, size).tolist() for size in (63, 1, 129, 64, 65, 127, 191, 5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("states") / "model", DELTA_NETS, random_tensors(DELTA_NETS))


@pytest.fixture(scope="module")
def llm(folder):
    with LLM(folder, **OPTIONS) as llm:
        yield llm


def check(llm, prompt, tokens):
    values = all_logits(llm, prompt + tokens, LENGTH)[len(prompt) - 1 : -1]
    gaps = np.diff(np.sort(values, axis=-1)[:, -2:], axis=-1)[:, 0]
    best = values.argmax(axis=-1).tolist()
    assert same(tokens, best, gaps)


def generated(llm, prompts, params):
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


@needs_them
def test_kernels_of_cpus(llm):
    """They run in each program that has the layers, on states that are where they were."""
    generated(llm, PROMPTS[1:2], GREEDY)
    texts = [program.as_text() for program in llm.engine.runner._executables.values()]
    texts = [text for text in texts if cpu.ATTEND in text]
    assert len(texts) > 1
    for text in texts:
        for target in (cpu.LINEAR_ATTENTION, cpu.CONVOLUTION):
            (line,) = (line for line in text.splitlines() if f'custom_call_target="{target}"' in line)
            assert "output_to_operand_aliasing={{0}: (0, {})}" in line
            states = line.split("= (")[1].split("{")[0]
            assert not any(f"= {states}" in line and " copy(" in line for line in text.splitlines())


@pytest.mark.parametrize(("name", "value"), [("kv_cache_dtype", "int8"), ("attention", "xla"), ("attention", "pallas")])
def test_options_of_attention_that_is_not_there(name, value, tmp_path):
    """Where a layer has it, they are for that one."""
    problem = f"{name} is {value!r}: no layer of this model keeps keys and values; leave it out"
    folder = write_checkpoint(tmp_path / "model", ALONE, random_tensors(ALONE))
    assert refusal(folder, **{name: value}) == problem
    target = find_target("v5e-1", compiles=False)
    assert line(lambda: fit(model_of(ALONE, target=target), target, **{name: value})) == problem
    target = find_target("h100", compiles=False)
    if value != "pallas":  # for which heads are too small
        assert fit(model_of(BESIDE, target=target), target, **{name: value})


@pytest.mark.slow
def test_beside_each_other(llm):
    """Prompts in chunks beside rows that decode, more of them than slots; some stop in the middle of a loop."""
    whole = generated(llm, PROMPTS, GREEDY)
    for prompt, tokens in zip(PROMPTS, whole, strict=True):
        check(llm, prompt, tokens)
    stops = [replace(GREEDY, stop_token_ids=[tokens[7 + i]]) for i, tokens in enumerate(whole)]
    for tokens, cut in zip(whole, generated(llm, PROMPTS, stops), strict=True):
        assert cut == tokens[: len(cut)]
        assert len(cut) < 16
    assert llm.stats.hit_tokens > 0


@pytest.mark.slow
def test_continuations_of_one_prompt(llm):
    """Each has a state of its own, from the prompt on."""
    params = SamplingParams(temperature=0.9, n=3, seed=7, max_tokens=20, ignore_eos=True)
    (output,) = llm.generate([{"prompt_token_ids": PROMPTS[4]}], params, use_tqdm=False)
    again = llm.generate([{"prompt_token_ids": PROMPTS[4]}], params, use_tqdm=False)[0]
    assert [each.token_ids for each in output.outputs] == [each.token_ids for each in again.outputs]
    assert len({tuple(each.token_ids) for each in output.outputs}) == 3


@pytest.mark.slow
def test_preempted(folder, llm):
    """There is room for less than two sequences: the others are computed again from their beginning."""
    with LLM(folder, kv_cache_memory=int(llm.sizes.bytes * 0.3), **OPTIONS) as small:
        params = replace(GREEDY, max_tokens=100)
        for prompt, tokens in zip(PROMPTS, generated(small, PROMPTS, params), strict=True):
            check(small, prompt, tokens[: LENGTH - len(prompt)])
        assert small.stats.preemptions > 0


@pytest.mark.slow
def test_a_thousand_tokens_do_not_drift(folder):
    """Log-probabilities of what was decoded are those of one forward over all of it."""
    length = 1100
    with LLM(folder, **OPTIONS | {"max_model_len": length, "max_num_seqs": 1}) as llm:
        params = SamplingParams(temperature=1.0, seed=3, max_tokens=1000, ignore_eos=True, logprobs=0)
        (output,) = llm.generate([{"prompt_token_ids": PROMPTS[0]}], params, use_tqdm=False)
        tokens = output.outputs[0].token_ids
        values = all_logits(llm, PROMPTS[0] + tokens, length)[len(PROMPTS[0]) - 1 : -1].astype(np.float64)
    expected = values - np.log(np.exp(values).sum(axis=-1, keepdims=True))
    ours = [logprobs[token].logprob for token, logprobs in zip(tokens, output.outputs[0].logprobs, strict=True)]
    np.testing.assert_allclose(ours, expected[np.arange(len(tokens)), tokens], atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(ALONE, id="alone", marks=pytest.mark.long),
        pytest.param(BESIDE, id="beside attention", marks=pytest.mark.slow),
    ],
)
def test_on_a_mesh(config, tmp_path):
    """What is for all heads is on each device: here one group, and B and C of Mamba."""
    folder = write_checkpoint(tmp_path / "model", config, random_tensors(config))
    found = []
    for mesh in (None, "data=2,tensor=2"):
        with LLM(folder, mesh=mesh, **OPTIONS) as llm:
            found += [llm.score(PROMPTS[2:5]), generated(llm, PROMPTS[2:5], GREEDY)]
            if mesh is None:
                for prompt, tokens in zip(PROMPTS[2:5], found[-1], strict=True):
                    check(llm, prompt, tokens)
    for one, split in zip(found[0], found[2], strict=True):
        np.testing.assert_allclose(split.logprobs, one.logprobs, atol=1e-4)
    assert found[1] == found[3]
