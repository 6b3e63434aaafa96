"""Models with sliding windows: the same tokens as without a cache, in no more pages than windows need."""

import json
import shutil
from collections import Counter
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxinfer import LLM, SamplingParams
from jaxinfer.attention import CacheLayout, LayerLayout
from jaxinfer.cache import ChunkedSpec, FullAttentionSpec, SlidingWindowSpec
from jaxinfer.engine.buckets import Buckets
from jaxinfer.engine.programs import Programs
from jaxinfer.models.model import AbstractModel
from jaxinfer.models.registry import REGISTRY, architecture
from tests.engine.reference import all_logits, same

LENGTH, NEW, WINDOW = 512, 60, 20
OPTIONS = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "page_size": 4, "max_model_len": LENGTH}
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)
# Mistral's layers have one window; of Qwen 3's two layers the first one has, the second sees everything.
MODELS = {"mistral-window": [WINDOW], "qwen3-layer_types-bias": [WINDOW, None]}


@pytest.fixture(
    scope="module", params=[pytest.param("mistral-window", marks=pytest.mark.slow), "qwen3-layer_types-bias"]
)
def folder(request, checkpoints, tmp_path_factory):
    """The tiny model for a longer context."""
    folder = tmp_path_factory.mktemp("windows") / request.param
    shutil.copytree(checkpoints(request.param).folder, folder)
    config = json.loads((folder / "config.json").read_text())
    changed = {"max_position_embeddings": 1024, "sliding_window": WINDOW}
    (folder / "config.json").write_text(json.dumps(config | changed))
    return folder


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    shared = rng.integers(0, 250, 200).tolist()
    return [shared[: 40 * i] + rng.integers(0, 250, 1 + 7 * i).tolist() for i in range(6)]


def check(llm, outputs, inputs=None):
    for prompt, output in zip(inputs or prompts(), outputs, strict=True):
        tokens = output.outputs[0].token_ids
        values = np.sort(all_logits(llm, prompt + tokens, LENGTH)[len(prompt) - 1 : -1], axis=-1)
        expected = all_logits(llm, prompt + tokens, LENGTH)[len(prompt) - 1 : -1].argmax(axis=-1).tolist()
        assert same(tokens, expected, values[:, -1] - values[:, -2])


def watched(llm, monkeypatch):
    """Most pages that a sequence held in each group when a call was launched."""
    launch, most = llm.engine.runner.launch, Counter()

    def launched(schedules):
        for request in (request for schedule in schedules for request in schedule.requests):
            most.update({i: max(len(held.pages) - most[i], 0) for i, held in enumerate(request.pages)})
        return launch(schedules)

    monkeypatch.setattr(llm.engine.runner, "launch", launched)
    return most


def test_the_same_tokens_in_a_window_s_pages(folder, monkeypatch):
    windows = MODELS[folder.name]
    with LLM(folder, **OPTIONS) as llm:
        programs, most = llm.engine.runner.programs, watched(llm, monkeypatch)
        layout = programs.layout
        assert {group.window for group in layout.groups} == set(windows)
        wide = LENGTH // 4
        narrow = -(-(WINDOW - 1 + 32 - 1) // 4) + 1
        assert programs.table_widths == tuple(narrow if group.window else wide for group in layout.groups)
        assert len(jax.tree.leaves(programs.state.cache)) == 2 * 2 // len(windows), "two layers, which may share arrays"
        check(llm, llm.generate([{"prompt_token_ids": prompt} for prompt in prompts()], GREEDY))
        assert llm.stats.pages_used == 0
        assert llm.stats.hit_tokens
        for i, group in enumerate(layout.groups):
            assert (most[i] <= narrow) == (group.window is not None)
        hits = llm.stats.hit_tokens
        check(llm, llm.generate([{"prompt_token_ids": prompt} for prompt in prompts()], GREEDY))
        assert llm.stats.hit_tokens - hits > 200


@pytest.mark.slow
def test_with_hardly_any_room(folder):
    """Requests wait or are preempted, and pages that have fallen out of windows go to others."""
    layers, longest = len(MODELS[folder.name]), [len(prompt) + NEW for prompt in prompts()]
    with LLM(folder, **OPTIONS) as probe:
        each = probe.sizes.bytes // probe.sizes.num_pages
    pages = 20 if layers == 1 else 92
    options = OPTIONS | {"max_model_len": max(longest), "kv_cache_memory": pages * each}
    with LLM(folder, **options) as llm:
        assert llm.sizes.num_pages == pages
        check(llm, llm.generate([{"prompt_token_ids": prompt} for prompt in prompts()], GREEDY))
        assert llm.stats.pages_used == 0
        assert llm.stats.preemptions or layers == 1


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=2", "fsdp=2,tensor=2"])
def test_over_a_mesh(folder, mesh):
    with LLM(folder, mesh=mesh, **OPTIONS) as llm:
        inputs = prompts()[1:5]
        check(llm, llm.generate([{"prompt_token_ids": prompt} for prompt in inputs], GREEDY), inputs)
        assert len(llm.engine.scheduler.shards) == 2


CHUNK = 24


@pytest.fixture
def chunked(folder, monkeypatch):
    """A family from outside: the same model, with chunks where the other has windows."""
    config = json.loads((folder / "config.json").read_text())
    original = architecture(config)

    def build(config, **options):
        module = original.build(config, **options)
        for attention in (layer.self_attn for layer in module.model.layers):
            if attention.spec.window is not None:
                attention.spec = replace(attention.spec, window=None, chunk=CHUNK)
                kept = attention.cache_spec
                attention.cache_spec = ChunkedSpec(kept.num_kv_heads, kept.head_dim, CHUNK, queries=kept.queries)
        return module

    (name,) = config["architectures"]
    theirs = replace(original, build=build)
    monkeypatch.setitem(REGISTRY, name, REGISTRY[name]._replace(source=theirs))
    return folder


def test_chunks(chunked, monkeypatch):
    """Whose tables show the last one alone: prompts and decoding calls end where chunks do."""
    windows = MODELS[chunked.name]
    with LLM(chunked, **OPTIONS) as llm:
        programs, most = llm.engine.runner.programs, watched(llm, monkeypatch)
        assert programs.table_widths == tuple(CHUNK // 4 if window else LENGTH // 4 for window in windows)
        check(llm, llm.generate([{"prompt_token_ids": prompt} for prompt in prompts()], GREEDY))
        assert [most[i] <= CHUNK // 4 for i in range(len(windows))] == [window is not None for window in windows]
        hits = llm.stats.hit_tokens
        check(llm, llm.generate([{"prompt_token_ids": prompt} for prompt in prompts()], GREEDY))
        assert llm.stats.hit_tokens > hits
        assert llm.stats.pages_used == 0
    with pytest.raises(ValueError, match="page_size is 16: it must divide 24, the model's chunk of attention"):
        LLM(chunked, **OPTIONS | {"page_size": 16})


def layout(windows, context=32768):
    device = jax.devices()[0]
    specs = [FullAttentionSpec(2, 16) if w is None else SlidingWindowSpec(2, 16, w) for w in windows]
    return CacheLayout.of([LayerLayout.of(spec, "float32", device) for spec in specs], context)


@pytest.mark.parametrize(
    ("windows", "groups", "arrays"),
    [
        ([None] * 4, [[0, 1, 2, 3]], 4),
        ([8] * 4, [[0, 1, 2, 3]], 4),
        ([32768] * 4, [[0, 1, 2, 3]], 4),
        ([8, 8, 8, None] * 2, [[0, 1], [2, 4], [5, 6], [3, 7]], 2),
        ([8, 8, None, 8, 8, None, 8], [[0, 1], [3, 4], [6], [2, 5]], 2),  # the third leaves an array unused
        ([8, 16, None], [[0], [1], [2]], 1),
    ],
)
def test_groups(windows, groups, arrays):
    """Layers of one geometry share arrays; each group has as many layers as the smallest kind."""
    cache_layout = layout(windows)
    assert [list(group.layers) for group in cache_layout.groups] == groups
    assert [pool.size for pool in cache_layout.pools] == [arrays]
    assert cache_layout.bytes_per_token == len(windows) * 2 * 2 * 16 * 4
    for group in cache_layout.groups:
        assert group.window == (windows[group.layers[0]] if windows[group.layers[0]] != 32768 else None)
        assert group.arrays == tuple(range(len(group.layers)))
    assert len(cache_layout.arrays([9], 16, 4)) == arrays


def test_what_a_long_context_takes():
    """Half the layers with a window of 64: of 16,384 tokens they keep the last few; and with all of them, all do."""
    both, full, window = (layout(windows) for windows in ([64, None], [None, None], [64, 64]))
    assert full.needed(16384, 16, 32) == (1024,)
    assert both.needed(16384, 16, 32) == (1024 + 7,)  # of half the bytes
    assert window.needed(16384, 16, 32) == (7,)
    assert both.needed(48, 16, 32) == (6,)
    sizes = [cache_layout.least(16384, 16, 32, 1) for cache_layout in (both, full, window)]
    assert sizes == [1032 * 4096, 1025 * 8192, 8 * 8192]
    assert [cache_layout.capacity([1025], 16384, 16, 32) for cache_layout in (full, window)] == [
        16384,
        16384 * 1024 // 7,
    ]


MIXED = {
    "model_type": "qwen3",
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 32768,
    "use_sliding_window": True,
    "sliding_window": 100,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
}


def test_programs_take_narrow_tables():
    """Three groups of two layers in two arrays; tables of windows are as wide as window and chunk need."""
    programs = Programs(
        AbstractModel.from_config(MIXED, "float32"),
        jax.devices()[0],
        Buckets.make(8, 64),
        num_pages=333,
        page_size=16,
        max_model_len=32768,
        max_rows=8,
        max_steps=32,
    )
    assert programs.table_widths == (12, 12, 2048)
    rows, *_ = programs["decode", 8].inputs
    assert [table.pages.shape for table in rows.tables] == [(8, 12), (8, 12), (8, 2048)]
    assert [table.first is None for table in rows.tables] == [False, False, True]
    shapes = {array.shape for array in jax.tree.leaves(programs.state.cache)}
    assert shapes == {(333, 2, 16, 16)}
    assert len(programs.state.cache) == 2
