"""The engine with the kernel of our own for TPUs, interpreted on a CPU."""

import functools

import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxinfer import LLM, SamplingParams
from jaxinfer.attention import paged_kernel
from jaxinfer.attention.paged import PAGED
from jaxinfer.attention.xla import XLAAttention
from tests.models.test_families import reference


@pytest.fixture
def _allowed(monkeypatch, capsys):
    """On a CPU the kernel is refused. With few keys and queries at a time."""
    interpret = pltpu.InterpretParams(detect_races=True)
    monkeypatch.setattr(type(PAGED), "supports", lambda *_: None)
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=interpret))
    monkeypatch.setattr(paged_kernel, "KEYS", 32)
    monkeypatch.setattr(paged_kernel, "QUERIES", 16)
    yield
    assert "RACE" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("_allowed")
@pytest.mark.parametrize("kept", ["auto", "int8"])
@pytest.mark.parametrize("model", ["qwen3-layer_types-bias", "gpt_oss"])
def test_the_same_tokens(checkpoints, model, kept):
    """As in plain XLA: prompts of several chunks, and rows that decode beside them."""
    sinks = model == "gpt_oss"
    folder = (reference(checkpoints.root, model, "large", greedy=True) if sinks else checkpoints(model)).folder
    prompts = [list(range(3, 3 + length)) for length in (5, 45, 1)]
    options = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "max_model_len": 64, "kv_cache_dtype": kept}
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    tokens = []
    for attention, kind in (("paged", type(PAGED)), ("xla", XLAAttention)):
        with LLM(folder, attention=attention, **options) as llm:
            outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
            tokens.append([output.outputs[0].token_ids for output in outputs])
            assert isinstance(llm.engine.runner.programs.layer_map.backends[0], kind)
    assert tokens[0] == tokens[1]
