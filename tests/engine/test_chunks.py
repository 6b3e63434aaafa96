"""Llama 4's attention in chunks through the engine: however a sequence is cut, tokens are those of a forward over all
of it, and a cache has no more of it than its last chunk."""

from functools import partial

import numpy as np
import pytest

from jaxinfer import LLM, SamplingParams
from tests.engine.reference import all_logits, same
from tests.engine.test_windows import watched
from tests.plain import random_tensors, write_checkpoint

CHUNK, PAGE, LENGTH, NEW = 16, 4, 256, 40
CONFIG = {
    "model_type": "llama4_text",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 48,
    "intermediate_size_mlp": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": CHUNK,
    "floor_scale": 20,
    "attn_scale": 0.8,
    "max_position_embeddings": 1024,
}
MODELS = {"and all": CONFIG, "alone": CONFIG | {"no_rope_layers": [1] * 4}}
OPTIONS = {"max_num_seqs": 4, "page_size": PAGE, "max_model_len": LENGTH, "dtype": "float32"}
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)
LENGTHS = [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK - 1, 2 * CHUNK, 2 * CHUNK + 1, 5 * CHUNK + 3]
slow = partial(pytest.param, marks=pytest.mark.slow)
TOKENS = np.random.default_rng(0).integers(0, 250, LENGTH).tolist()


@pytest.fixture(scope="module", params=["and all", slow("alone")])
def folder(request, tmp_path_factory):
    config = MODELS[request.param]
    return write_checkpoint(tmp_path_factory.mktemp("chunks") / request.param, config, random_tensors(config))


def prompts() -> list[list[int]]:
    """Of all lengths, which begin with tokens of their own."""
    return [[250 + i, *TOKENS][:length] for i, length in enumerate(LENGTHS)]


def generate(llm, inputs, params=GREEDY):
    """Tokens, which are checked."""
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in inputs], params, use_tqdm=False)
    for prompt, output in zip(inputs, outputs, strict=True):
        tokens = output.outputs[0].token_ids
        values = all_logits(llm, prompt + tokens, LENGTH)[len(prompt) - 1 : -1]
        best = np.sort(values, axis=-1)
        assert same(tokens, values.argmax(axis=-1).tolist(), best[:, -1] - best[:, -2]), len(prompt)
    assert llm.stats.pages_used == 0
    return outputs


@pytest.mark.parametrize("budget", [slow(4), CHUNK - 5, slow(CHUNK), slow(3 * CHUNK)])
def test_prompts_in_pieces_beside_rows_that_decode(folder, budget, monkeypatch):
    with LLM(folder, max_num_batched_tokens=budget, **OPTIONS) as llm:
        chunks = [group.chunk for group in llm.engine.runner.programs.layout.groups]
        assert set(chunks) == ({CHUNK, None} if folder.name == "and all" else {CHUNK})
        most = watched(llm, monkeypatch)
        generate(llm, prompts())
        longest = -(-(max(LENGTHS) + NEW) // PAGE)
        assert [most[i] for i in range(len(chunks))] == [CHUNK // PAGE if chunk else longest for chunk in chunks]


@pytest.mark.parametrize("attention", ["auto", slow("xla")])
def test_scores(folder, attention):
    inputs = [prompt for prompt in prompts() if len(prompt) > 1]
    with LLM(folder, max_num_batched_tokens=CHUNK + 1, attention=attention, **OPTIONS) as llm:
        for prompt, scored in zip(inputs, llm.score(inputs), strict=True):
            logits = all_logits(llm, prompt, LENGTH)[:-1]
            logprobs = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
            np.testing.assert_allclose(scored.logprobs, logprobs[np.arange(len(logits)), prompt[1:]], atol=1e-4)


def test_prefixes(folder):
    """What begins alike is found up to its last full page, at the edges of chunks and between them."""
    long = TOKENS[: 5 * CHUNK + 3]
    begins = [PAGE, CHUNK - 1, CHUNK, CHUNK + 1, CHUNK + PAGE, 3 * CHUNK - PAGE, 3 * CHUNK, 3 * CHUNK + 2 * PAGE + 1]
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    with LLM(folder, max_num_batched_tokens=32, **OPTIONS | {"max_num_seqs": 32}) as llm:
        generate(llm, [long], params)
        for i, count in enumerate(begins):
            before = llm.stats.hit_tokens
            generate(llm, [[*long[:count], 260 + i, *range(CHUNK)]], params)
            assert llm.stats.hit_tokens - before == count // PAGE * PAGE
        before = llm.stats.hit_tokens
        generate(llm, [[*long[:count], 260 + i, *range(CHUNK)] for i, count in enumerate(begins)], params)
        assert llm.stats.hit_tokens - before > sum(begins)


@pytest.mark.slow
def test_with_hardly_any_room(folder):
    """Requests wait or are preempted, and are computed again."""
    with LLM(folder, max_num_batched_tokens=32, **OPTIONS) as probe:
        each = probe.sizes.bytes // probe.sizes.num_pages
        groups = probe.engine.runner.programs.layout.groups
    longest = max(LENGTHS) + NEW
    pages = sum(group.most_pages(longest, PAGE, 32) for group in groups) + 2
    options = OPTIONS | {"max_model_len": longest, "kv_cache_memory": (pages + 1) * each}
    with LLM(folder, max_num_batched_tokens=32, **options) as llm:
        assert llm.sizes.num_pages == pages + 1
        generate(llm, prompts())
        assert llm.stats.preemptions or folder.name == "alone"


@pytest.mark.slow
def test_many_steps_end_where_chunks_do(folder):
    """Rows at all places of a chunk decode together; and what is drawn with a seed does not depend on others."""
    inputs = [[250 + i, *TOKENS[: CHUNK + i]] for i in range(CHUNK)]
    params = [SamplingParams(temperature=1.0, seed=i, max_tokens=2 * CHUNK, ignore_eos=True) for i in range(CHUNK)]
    with LLM(folder, max_num_batched_tokens=64, **OPTIONS | {"max_num_seqs": CHUNK}) as llm:
        generate(llm, inputs)
        together = llm.generate(inputs, params, use_tqdm=False)
    with LLM(folder, max_num_batched_tokens=5, enable_prefix_caching=False, **OPTIONS | {"max_num_seqs": 1}) as llm:
        alone = llm.generate(inputs, params, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in together] == [output.outputs[0].token_ids for output in alone]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=2", "fsdp=2,tensor=2"])
def test_over_a_mesh(folder, mesh):
    with LLM(folder, mesh=mesh, max_num_batched_tokens=32, **OPTIONS) as llm:
        generate(llm, prompts())


@pytest.mark.slow
def test_beams(folder):
    """Which go on from pages that they share, over the end of a chunk."""
    prompt = TOKENS[: CHUNK - 2]
    with LLM(folder, max_num_batched_tokens=32, **OPTIONS) as llm:
        (found,) = llm.beam_search([prompt], beam_width=2, max_tokens=5, ignore_eos=True)
        for beam in found.sequences:
            logits = all_logits(llm, prompt + beam.token_ids, LENGTH)[len(prompt) - 1 : -1]
            logprobs = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
            total = logprobs[np.arange(len(logits)), beam.token_ids].sum()
            np.testing.assert_allclose(beam.cumulative_logprob, total, atol=1e-3)


@pytest.mark.parametrize(("chunk", "size"), [slow(CHUNK, 16), (20, 4), slow(8192, 16)])
def test_pages_that_nobody_asked_for_divide_chunks(tmp_path, chunk, size):
    config = CONFIG | {"attention_chunk_size": chunk}
    folder = write_checkpoint(tmp_path / "model", config, random_tensors(config))
    options = {name: value for name, value in OPTIONS.items() if name != "page_size"}
    with LLM(folder, max_num_batched_tokens=32, **options) as llm:
        assert llm.sizes.page_size == size
        generate(llm, [TOKENS[:45]])
    if chunk == 20:
        with pytest.raises(ValueError, match="page_size is 16: it must divide 20, the model's chunk of attention"):
            LLM(folder, max_num_batched_tokens=32, **OPTIONS | {"page_size": 16})
