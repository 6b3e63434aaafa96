"""The packaged encoder and classifier: what they are, what they get right, and that transformers loads them too."""

import json

import numpy as np
import pytest

import jaxinfer
from jaxinfer.demo import CLASSIFIER_DIR, ENCODER_DIR, encoders, evaluate
from jaxinfer.demo.families import FAMILIES
from jaxinfer.demo.phrasings import held_out_pairs, training_pairs
from jaxinfer.demo.questions import is_held_out

FOLDERS = {
    ENCODER_DIR: ("ModernBertModel", encoders.ENCODER),
    CLASSIFIER_DIR: ("ModernBertForSequenceClassification", encoders.CLASSIFIER),
}
TINY = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_size():
    assert sum(path.stat().st_size for folder in FOLDERS for path in folder.rglob("*")) <= 4 * 2**20


@pytest.mark.parametrize("folder", FOLDERS)
def test_it_is_what_the_script_in_the_package_makes(folder):
    tokenizer = encoders.tokenizer_for_families()
    assert json.loads((folder / "tokenizer.json").read_text()) == json.loads(tokenizer.to_str())
    config = encoders.config(FOLDERS[folder][0], tokenizer.get_vocab_size(), FOLDERS[folder][1])
    assert json.loads((folder / "config.json").read_text()) == config


def test_pairs():
    pairs = [*held_out_pairs(130), *next(training_pairs(0, 64))]
    for first, second in pairs:
        assert (first.family, first.content) == (second.family, second.content)
        assert first.text != second.text
    assert [is_held_out(first) for first, _ in pairs] == [True] * 130 + [False] * 64
    assert {first.family for first, _ in pairs[:130]} == set(FAMILIES)
    assert len({(first.family, first.content) for first, _ in pairs[:130]}) == 130


@pytest.mark.parametrize("folder", FOLDERS)
def test_it_is_right_about_held_out_questions(folder):
    with jaxinfer.LLM(folder) as llm:
        questions, right = evaluate.answered(llm, 260, seed=4)
    assert len(questions) == len(right) == 260
    assert sum(right) / len(right) >= 0.98


def test_transformers_gives_the_same_vectors():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(ENCODER_DIR)
    model = transformers.AutoModel.from_pretrained(ENCODER_DIR, dtype=torch.float32)
    try:
        for first, _ in held_out_pairs(3, seed=9):
            with torch.no_grad():
                hidden = model(**tokenizer(first.text, return_tensors="pt")).last_hidden_state[0].numpy()
            theirs = hidden.mean(axis=0) / np.linalg.norm(hidden.mean(axis=0))
            np.testing.assert_allclose(jaxinfer.embed(first.text, dtype="float32"), theirs, atol=1e-5)
    finally:
        jaxinfer.unload()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["encoder", "classifier"])
def test_two_steps_write_a_model_that_loads(kind, tmp_path):
    pytest.importorskip("optax")
    make = {"encoder": encoders.make_encoder, "classifier": encoders.make_classifier}[kind]
    make(tmp_path / "model", 2, 0, TINY)
    with jaxinfer.LLM(tmp_path / "model") as llm:
        assert llm.task == ("embed" if kind == "encoder" else "classify")
        evaluate.answered(llm, 13, seed=0)
