"""Gemma 4: what its fields say of each layer, and caches that several layers read, through the engine."""

import math
import re

import jax
import numpy as np
import pytest

from jaxinfer import LLM, CheckpointError, SamplingParams
from jaxinfer.cache import FullAttentionSpec, SharedSpec, SlidingWindowSpec
from jaxinfer.engine.programs.base import cache_layout
from jaxinfer.models.model import AbstractModel
from jaxinfer.models.registry import parse_config
from jaxinfer.plan.fit import model_of
from jaxinfer.plan.roofline import bound
from jaxinfer.plan.targets import find_target
from tests.engine.reference import all_logits, same
from tests.models.families import BASE
from tests.plain import random_tensors, write_checkpoint
from tests.refusals import line

FULL, SLIDING = "full_attention", "sliding_attention"
HEADS = {"head_dim": 16, "global_head_dim": 32, "num_attention_heads": 8, "num_key_value_heads": 8}
KEYS_AS_VALUES = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
SHARED = {"num_hidden_layers": 6, "layer_types": [SLIDING, FULL] * 3, "num_kv_shared_layers": 2, "sliding_window": 20}
INPUTS = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 300}
EXPERTS = {"enable_moe_block": True, "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 24}
TEXT = BASE | HEADS | {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0}
SMALL = TEXT | SHARED | KEYS_AS_VALUES | INPUTS | EXPERTS | {"use_double_wide_mlp": True}


def parsed(**fields):
    return parse_config(TEXT | fields)[1]


def test_heads_of_full_layers():
    types = {"layer_types": [SLIDING, FULL]}
    assert parsed(**types).heads == ((8, 16), (8, 32))
    assert parsed(**types, global_head_dim=None).heads == ((8, 16), (8, 512))
    assert parsed(**types, num_global_key_value_heads=2).heads == ((8, 16), (8, 32))
    config = parsed(**types, attention_k_eq_v=True, num_global_key_value_heads=2)
    assert config.heads == ((8, 16), (2, 32))
    assert config.key_is_value == (False, True)
    assert (config.num_kv_heads, config.head_dim) == (8, 32)


@pytest.mark.parametrize("name", ["1", "01"])
def test_heads_of_single_layers(name):
    """As transformers 5 writes them; fields of full layers count no more then."""
    types = {"layer_types": [SLIDING, FULL]}
    own = {"head_dim": 64, "num_key_value_heads": 4}
    assert parsed(**types, per_layer_config={name: own}, attention_k_eq_v=True).heads == ((8, 16), (4, 64))
    assert parsed(**types, per_layer_config={}).heads == ((8, 16), (8, 16))
    assert parsed(**types, per_layer_config=None).heads == ((8, 16), (8, 16))


def test_layers_that_read_others():
    config = parsed(**SHARED, use_double_wide_mlp=True)
    assert config.owners == (0, 1, 2, 3, 2, 3)
    assert config.widths == (48, 48, 48, 48, 96, 96)
    assert parsed(num_hidden_layers=7).windows == (*(512,) * 5, None, None)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention is 'all'"),
        ({"num_kv_shared_layers": 2}, "num_kv_shared_layers is 2: of the 2 layers"),
        ({"num_kv_shared_layers": 9}, "num_kv_shared_layers is 9"),
        ({"layer_types": [SLIDING, FULL], "num_kv_shared_layers": 1}, "num_kv_shared_layers is 1"),
        ({"global_head_dim": 0}, "head_dim is 0"),
        ({"global_head_dim": 7}, "global_head_dim is 7: rotary"),
        ({**KEYS_AS_VALUES, "num_global_key_value_heads": 3}, "num_global_key_value_heads is 3: it must"),
        ({"per_layer_config": {"2": {"head_dim": 8}}}, "per_layer_config is"),
        ({"per_layer_config": {"0": {"intermediate_size": 8}}}, "per_layer_config is .*: of a layer only head_dim"),
        ({"per_layer_config": [1]}, "per_layer_config is"),
        ({"layer_types": [FULL] * 2, "per_layer_config": {"0": {"head_dim": 8}}}, "per_layer_config is .*same for all"),
        ({"rope_parameters": {FULL: {"rope_type": "default"}}, "layer_types": [SLIDING, FULL]}, "rope_parameters is"),
        ({"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 299}, "vocab_size_per_layer_input is 299"),
        ({**EXPERTS, "top_k_experts": 7}, "top_k_experts is 7: it must be at most num_experts, 6"),
        ({**EXPERTS, "moe_intermediate_size": None}, "moe_intermediate_size is null"),
        ({"model_type": "gemma4_unified_text", "enable_moe_block": True}, "enable_moe_block is True"),
        ({"model_type": "gemma4_unified_text", **INPUTS}, "hidden_size_per_layer_input is 8"),
    ],
)
def test_refused(fields, problem):
    assert re.search(problem, line(lambda: parsed(**fields), CheckpointError))


def test_more_heads_of_full_layers():
    types = {"layer_types": [SLIDING, FULL]}
    config = parsed(**types, num_key_value_heads=1, attention_k_eq_v=True, num_global_key_value_heads=4)
    assert config.heads == ((1, 16), (4, 32))
    assert config.num_kv_heads == 4


# As on the hub: layers, width, MLP, heads, key heads, those of full layers, which layers are full, and more.
ROPES = {
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
}
INPUTS_OF_E2B = {"hidden_size_per_layer_input": 256}
LARGE = {
    "E2B": (35, 1536, 6144, 8, 1, None, 5, {"num_kv_shared_layers": 20, "use_double_wide_mlp": True, **INPUTS_OF_E2B}),
    "12B": (48, 3840, 15360, 16, 8, 1, 6, {}),
    "26B-A4B": (30, 2816, 2112, 16, 8, 2, 6, EXPERTS | {"num_experts": 128, "moe_intermediate_size": 704}),
    "31B": (60, 5376, 21504, 32, 16, 4, 6, {}),
}


def config_of(size):
    layers, hidden, width, heads, kv_heads, of_full, period, more = LARGE[size]
    unified = size == "12B"
    text = {
        "model_type": "gemma4_unified_text" if unified else "gemma4_text",
        "vocab_size": 262144,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_global_key_value_heads": of_full,
        "attention_k_eq_v": of_full is not None,
        "head_dim": 256,
        "global_head_dim": 512,
        "layer_types": [SLIDING if (i + 1) % period else FULL for i in range(layers)],
        "rope_parameters": ROPES,
        "sliding_window": 1024,
        "use_bidirectional_attention": "vision",
        "hidden_size_per_layer_input": 0,
    }
    return {"model_type": "gemma4_unified" if unified else "gemma4", "text_config": text | more}


@pytest.mark.parametrize(
    ("size", "parameters", "sliding", "full"),
    [
        ("E2B", 4.6e9, (12, 1), (3, 1)),
        ("12B", 11.9e9, (40, 8), (8, 1)),
        ("26B-A4B", 25.2e9, (25, 8), (5, 2)),
        ("31B", 30.7e9, (50, 16), (10, 4)),
    ],
)
def test_large_ones(size, parameters, sliding, full):
    """sliding, full: layers that have a cache, and key/value heads of each."""
    model = model_of(config_of(size), "bfloat16")
    assert sum(math.prod(spec.shape) for spec in model.params.values()) == pytest.approx(parameters, rel=0.02)
    layout = cache_layout(model, find_target("v5e-1", compiles=False).devices[0])
    counts = dict.fromkeys((1024, None), 0)
    for group in layout.groups:
        counts[group.window] += len(group.layers)
    assert counts == {1024: sliding[0], None: full[0]}
    token = sum(2 * 2 * layers * heads * size for (layers, heads), size in ((sliding, 256), (full, 512)))
    assert layout.bytes_per_token == token


def test_what_is_looked_up_is_not_read():
    """Of E2B's tables only the head is read at each step, and layers that have no cache read others'."""
    model, target = model_of(config_of("E2B"), "bfloat16"), find_target("v5e-1", compiles=False)
    layout = cache_layout(model, target.devices[0])
    looked_up = math.prod(model.params["model.embed_tokens_per_layer.weight"].shape)
    assert [layout.readers(group) for group in layout.groups if group.window is None] == [7]
    keys = sum(layout.readers(group) * layout.of_group(group).bytes_per_token for group in layout.groups) * 1024
    step = bound(model, target.chip, layout, 1, 1, 1024, 1)
    assert step.moved == pytest.approx(model.nbytes - 2 * looked_up + keys, rel=1e-3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("gemma4") / "small", SMALL, random_tensors(SMALL))


LENGTH, NEW = 512, 40
OPTIONS = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "page_size": 4, "max_model_len": 256, "dtype": "float32"}
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)


def prompts():
    rng = np.random.default_rng(0)
    shared = rng.integers(0, 250, 120).tolist()
    return [shared[: 30 * i] + rng.integers(0, 250, 1 + 7 * i).tolist() for i in range(5)]


def check(llm, outputs, inputs=None):
    """Whole forwards give the same tokens, or others that are nearly as good."""
    for prompt, output in zip(inputs or prompts(), outputs, strict=True):
        tokens = output.outputs[0].token_ids
        values = all_logits(llm, prompt + tokens, LENGTH)[len(prompt) - 1 : -1]
        best = np.sort(values, axis=-1)
        assert same(tokens, values.argmax(axis=-1).tolist(), best[:, -1] - best[:, -2])


def generate(llm, inputs=None):
    return llm.generate([{"prompt_token_ids": prompt} for prompt in inputs or prompts()], GREEDY, use_tqdm=False)


def test_only_owners_have_a_cache(folder):
    model = AbstractModel.from_config(SMALL, "float32")
    sliding, full = SlidingWindowSpec(8, 16, 20), FullAttentionSpec(1, 32)
    assert model.cache_specs == (sliding, full, sliding, full, SharedSpec(2), SharedSpec(3))
    layout = cache_layout(model, jax.devices()[0])
    places = layout.layer_map(4).places
    assert places[4:] == places[2:4]
    assert len(jax.tree.leaves(layout.arrays([3, 3], 4, 2))) == 2 * 4
    assert layout.bytes_per_token == 4 * 2 * 2 * (8 * 16 + 32)


@pytest.mark.slow
def test_pieces_windows_and_prefixes(folder):
    """Prompts in pieces beside rows that decode, longer than windows; and prefixes that were there."""
    with LLM(folder, **OPTIONS) as llm:
        check(llm, generate(llm))
        hits = llm.stats.hit_tokens
        check(llm, generate(llm))
        assert llm.stats.hit_tokens - hits > 100
        assert llm.stats.pages_used == 0


@pytest.mark.slow
def test_preempted(folder):
    """Short prompts, all of which begin, and have no room for what comes after them."""
    inputs = [prompt[:6] for prompt in prompts()[1:]]
    params = SamplingParams(temperature=0.0, max_tokens=150, ignore_eos=True)
    with LLM(folder, **OPTIONS) as probe:
        each = probe.sizes.bytes // probe.sizes.num_pages
    with LLM(folder, **OPTIONS | {"kv_cache_memory": 24 * each, "max_model_len": 160}) as llm:
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in inputs], params, use_tqdm=False)
        check(llm, outputs, inputs)
        assert llm.stats.preemptions
        assert llm.stats.pages_used == 0


@pytest.mark.parametrize(
    "mesh",
    [
        *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in ("tensor=8", "fsdp=2,tensor=4")),
        *(pytest.param(mesh, marks=pytest.mark.long) for mesh in ("tensor=4", "data=2,tensor=2")),
    ],
)
def test_over_a_mesh(folder, mesh):
    """Where there are fewer heads than devices they are kept on each, and only there."""
    with LLM(folder, mesh=mesh, **OPTIONS) as llm:
        layout, inputs = llm.engine.runner.programs.layout, prompts()[:4]
        parts = int(mesh[-1])
        assert layout.bytes_per_token == 4 * 2 * 2 * (8 // parts * 16 + 32)
        check(llm, generate(llm, inputs), inputs)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"quantization": "int8"}, {"kv_cache_dtype": "int8"}, {"attention": "xla"}])
def test_quantized(folder, options):
    """Weights, or caches, in eight bits: nearly the same scores."""
    (prompt,) = prompts()[-1:]
    with LLM(folder, **OPTIONS | options) as llm, LLM(folder, **OPTIONS) as plain:
        (scored,), (expected,) = llm.score([prompt]), plain.score([prompt])
    exact = options == {"attention": "xla"}
    off = np.abs(np.array(scored.logprobs) - np.array(expected.logprobs))
    assert off.max() < 1e-3 if exact else 0 < off.mean() < 0.3
