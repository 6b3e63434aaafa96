"""Programs of models without a cache that were compiled ahead; what can be wrong with a folder: test_compiled.py."""

import json

import numpy as np
import pytest

from jaxinfer import LLM
from jaxinfer.demo import CLASSIFIER_DIR, ENCODER_DIR
from jaxinfer.engine.loading import open_model
from jaxinfer.engine.pooling.load import local_pooling_programs
from jaxinfer.plan.ship import ship

OPTIONS = {"max_num_batched_tokens": 128, "max_model_len": 64, "dtype": "float32"}
TEXTS = ["What is 27 + 45?", "Which month is 3 months after May?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled") / "programs"
    ship(local_pooling_programs(open_model(ENCODER_DIR, **OPTIONS)), None, str(folder), lambda: None)
    return folder


def vectors(llm):
    return np.stack([output.outputs.embedding for output in llm.embed(TEXTS, use_tqdm=False)])


def test_nothing_compiles(folder, caplog):
    with LLM(ENCODER_DIR, **OPTIONS) as llm:
        expected = vectors(llm)
    with LLM(ENCODER_DIR, compiled=folder, warmup=True) as llm:  # options are what it was made with
        assert llm._pooling.compilations == 0
        assert llm._pooling.programs.max_model_len == 64
        np.testing.assert_array_equal(vectors(llm), expected)
        assert len(list(folder.glob("*.xla"))) == len(llm._pooling.programs.keys())
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("model", "options", "fact"),
    [
        (ENCODER_DIR, {"max_model_len": 32}, "option max_model_len was 64 and is 32"),
        (ENCODER_DIR, {"pooler_config": {"pooling_type": "CLS"}}, "what is done with hidden states was "),
        (CLASSIFIER_DIR, {}, "the model's hidden_size was 128 and is 64"),
    ],
)
def test_what_differs_is_said(folder, caplog, model, options, fact):
    with LLM(model, compiled=folder, **options) as llm:
        assert llm.task in ("embed", "classify")
    assert f"compiled programs in {folder}: not used: " in caplog.text
    assert fact in caplog.text


def test_the_command(cli, tmp_path):
    out = tmp_path / "programs"
    few = "--max-num-batched-tokens", "64", "--max-model-len", "64", "-o", out
    assert "programs, " in cli("compile", CLASSIFIER_DIR, *few).out
    assert json.loads((out / "manifest.json").read_text())["pooler"] == "None"
