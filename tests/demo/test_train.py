"""Training: what it does in two steps, on a model much smaller than the real one."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxinfer
from jaxinfer.demo import train, training
from jaxinfer.demo.tokenizer import BOS_ID, EOS_ID, load_tokenizer

pytest.importorskip("optax")

TINY = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("train") / "below" / "model"
    train.make(folder, steps=2, seed=0, architecture=TINY)
    return folder


def test_two_steps_write_a_model_that_loads(trained):
    (output,) = jaxinfer.LLM(trained).generate("What is 27 + 45?", jaxinfer.SamplingParams(max_tokens=2, temperature=0))
    assert output.prompt_token_ids[0] == BOS_ID
    assert len(output.outputs[0].token_ids) == 2
    assert [path.name for path in trained.parent.iterdir()] == ["model"]


@pytest.mark.slow
def test_a_seed_gives_the_same_weights_and_another_does_not(trained, tmp_path):
    first = load_file(trained / "model.safetensors")
    train.make(tmp_path / "again", steps=2, seed=0, architecture=TINY)
    train.make(tmp_path / "other", steps=2, seed=1, architecture=TINY)
    again, other = (load_file(tmp_path / name / "model.safetensors") for name in ("again", "other"))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not any(np.array_equal(first[name], other[name]) for name in first if "norm" not in name)


@pytest.mark.slow
def test_training_lowers_the_loss(capsys, tmp_path):
    train.make(tmp_path / "model", steps=101, seed=0, architecture=TINY)
    first, last = (float(line.split("loss ")[1].split(",")[0]) for line in capsys.readouterr().err.splitlines())
    assert last < first - 0.5


def test_examples_are_packed_whole_and_only_answers_count():
    tokenizer = load_tokenizer(train.tokenizer_for_families())
    batch, targets, weights = next(train.batches(tokenizer, seed=0))
    used = 0
    for tokens, positions, row, target, weight in zip(
        batch.tokens, batch.positions, batch.segment_ids, targets, weights, strict=True
    ):
        for start in np.flatnonzero(tokens == BOS_ID):
            own = np.flatnonzero(row == row[start])
            assert own[0] == start
            assert positions[own].tolist() == list(range(len(own)))
            assert target[own[-1]] == EOS_ID
            assert target[own[:-1]].tolist() == tokens[own[1:]].tolist()
            answered = own[weight[own] == 1]
            assert answered.tolist() == list(range(answered[0], own[-1] + 1))
            question = tokenizer.decode(tokens[own[0] + 1 : answered[0] + 1].tolist())
            answer = tokenizer.decode(target[answered].tolist())
            assert question.split()[0].lower() in FIRST_WORDS
            assert answer.endswith(".")
            used += len(own)
        assert not weight[row == train.ROW_LENGTH].any()
    assert used > 0.85 * targets.size


FIRST_WORDS = {
    *["what", "which", "how", "add", "calculate", "subtract", "continue", "sort", "put", "order"],
    *["write", "spell", "reverse", "count"],
}


def test_nothing_is_left_of_a_model_that_can_not_be_saved(monkeypatch, tmp_path):
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(training, "_write", fail)
    with pytest.raises(OSError, match="disk full"):
        train.save(tmp_path / "model", {"weight": np.ones((2, 2), np.float32)}, {"config.json": {}})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "{tmp}"], "is there already"),
        (["--steps", "0", "--output", "{tmp}/new"], "give at least 1"),
        (["--steps", "many"], "invalid int"),
    ],
)
def test_bad_arguments_are_refused_in_a_line(arguments, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as exit:
        train.main([argument.format(tmp=tmp_path) for argument in arguments])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_without_optax_it_says_how_to_install_it(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "optax", None)
    with pytest.raises(SystemExit):
        train.main(["--output", str(tmp_path / "new")])
    assert "pip install '.[train]'" in capsys.readouterr().err


def test_settings_of_the_saved_model(trained):
    settings = json.loads((trained / "config.json").read_text())
    assert settings["vocab_size"] == load_tokenizer((trained / "tokenizer.model").read_bytes()).vocab_size()
    assert json.loads((trained / "generation_config.json").read_text())["eos_token_id"] == EOS_ID
