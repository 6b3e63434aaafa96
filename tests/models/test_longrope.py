"""Longrope's two lists of factors: which of them are used follows from max_model_len, and both are transformers'."""

import json
import logging

import jax
import numpy as np
import pytest

from jaxinfer import LLM, SamplingParams
from jaxinfer.attention import ForwardBatch
from jaxinfer.checkpoint.folder import Checkpoint
from jaxinfer.checkpoint.load import load_params
from jaxinfer.engine.load import local_programs
from jaxinfer.models.config import describe_config
from jaxinfer.models.model import AbstractModel
from jaxinfer.models.registry import parse_config
from jaxinfer.plan.figures import context_of
from jaxinfer.plan.fit import fit, model_of
from jaxinfer.plan.ship import ship
from jaxinfer.plan.targets import find_target
from tests.models.families import Variant, phimoe
from tests.models.families.phi3 import LONG
from tests.models.test_families import SCALES, TOLERANCE, error, make
from tests.refusals import line

ORIGINAL, CONTEXT = 40, 256
OPTIONS = {"max_num_seqs": 1, "max_num_batched_tokens": 32, "page_size": 8}
TOKENS = np.random.default_rng(5).integers(0, 300, 200).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("longrope") / "phi3"
    fields = LONG | {"original_max_position_embeddings": ORIGINAL, "max_position_embeddings": CONTEXT}
    make(Variant("Phi3Config", fields), *SCALES["large"], folder)
    return folder


@pytest.fixture(scope="module")
def config(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def logits(folder, config):
    """Ours, of these tokens by a model for so many."""

    def of(tokens, max_model_len):
        model = AbstractModel.from_config(config, "float32", max_model_len=max_model_len)
        with Checkpoint(folder) as checkpoint:
            params = load_params(model, checkpoint, jax.devices()[0])
        run = jax.jit(lambda params, batch: model.bind(params)(batch, None)[0])
        return np.asarray(run(params, ForwardBatch.of_sequences([tokens])))

    return of


def test_both_are_transformers(folder, logits):
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        short, long = (model(torch.tensor([TOKENS[:n]])).logits[0].numpy() for n in (ORIGINAL, len(TOKENS)))
    for most in (None, ORIGINAL):
        assert error(logits(TOKENS[:ORIGINAL], most), short) < TOLERANCE
    for most in (ORIGINAL + 1, CONTEXT):
        assert error(logits(TOKENS, most), long) < TOLERANCE
    assert error(logits(TOKENS, None), long) > 100 * TOLERANCE
    assert error(logits(TOKENS[:ORIGINAL], CONTEXT), short) > 100 * TOLERANCE


def test_what_is_asked_for_decides_for_sequences_of_any_length(folder, logits, caplog):
    greedy = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    with caplog.at_level(logging.WARNING), LLM(folder, **OPTIONS) as llm:
        assert llm.sizes.max_model_len == ORIGINAL
    assert not caplog.records
    with LLM(folder, max_model_len=128, **OPTIONS) as llm:
        (output,) = llm.generate([TOKENS[:5]], greedy)
    (record,) = caplog.records
    assert "max_model_len is 128, beyond the original context of 40 tokens" in record.getMessage()
    answer = output.outputs[0].token_ids
    chosen = logits(TOKENS[:5] + answer, 128)[4:-1].argmax(axis=-1).tolist()
    assert answer == chosen
    assert f"at most {CONTEXT}" in line(lambda: LLM(folder, max_model_len=CONTEXT + 1, **OPTIONS))


def test_what_scales_both_where_they_say_so():
    """Phi with experts. (transformers 5 takes the short factors for long contexts, too; its authors' code does not.)"""
    data = phimoe.VARIANTS["phimoe-longrope"].fields | {"model_type": "phimoe"}
    config = parse_config(data)[1]
    for rope, which in ((config.ropes[0], "short"), (config.for_length(129).ropes[0], "long")):
        cos, _ = rope.cos_sin(np.arange(2))
        angles = 300.0 ** -(np.arange(4) / 4) / phimoe.FACTORS[f"{which}_factor"]
        np.testing.assert_allclose(cos[0], phimoe.LONG[f"{which}_mscale"], rtol=1e-6)
        np.testing.assert_allclose(cos[1], np.cos(angles) * phimoe.LONG[f"{which}_mscale"], rtol=1e-5)


def test_plans_and_programs_know(config):
    model = parse_config(config)[1]
    assert model.for_length(ORIGINAL) is model
    long = model.for_length(128)
    assert (model.max_context, long.max_context) == (ORIGINAL, CONTEXT)
    assert describe_config(long) != describe_config(model)  # of which the keys of kept programs are made
    held = fit(
        model_of(config, max_model_len=128), find_target("v5e-1", compiles=False), **OPTIONS | {"max_model_len": 128}
    )
    assert json.loads(held.model.declared.described) == describe_config(long)
    programs, _ = local_programs(config, OPTIONS | {"max_model_len": 128})
    assert json.loads(programs.model.declared.described) == describe_config(long)
    assert context_of(long, 100, {"max_model_len": 128}) == 100


@pytest.mark.slow
def test_compiled_ahead(folder, config, tmp_path, caplog):
    options = OPTIONS | {"max_model_len": 64}
    ship(*local_programs(config, options), str(tmp_path / "programs"), lambda: None)
    with caplog.at_level(logging.WARNING), LLM(folder, compiled=tmp_path / "programs") as llm:
        llm.generate([TOKENS[:5]], SamplingParams(temperature=0.0, max_tokens=50, ignore_eos=True))
        assert llm.engine.runner.compilations == 0
        assert llm.model.config.max_context == CONTEXT
    assert ["beyond the original context" in record.getMessage() for record in caplog.records] == [True]
