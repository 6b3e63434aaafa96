"""What a checkpoint's generation_config.json asks for, field by field, against `transformers.generate`."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from jaxinfer import LLM, SamplingParams
from jaxinfer.engine.defaults import NOT_DONE, checkpoint_params
from tests.engine.reference import all_logits

NEW, VOCAB, EOS = 24, 300, 2
PROMPTS = [np.random.default_rng(i).integers(3, 250, n).tolist() for i, n in enumerate((1, 9, 20))]


@pytest.fixture(scope="module")
def llm(checkpoints):
    with LLM(checkpoints("llama").folder, max_num_seqs=4, max_num_batched_tokens=32, page_size=8) as llm:
        llm.engine.eos_token_ids = (EOS,)
        yield llm
        assert llm.stats.pages_used == 0


@pytest.fixture(scope="module")
def plain(llm):
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params_of({}))]


def params_of(fields):
    return SamplingParams(**checkpoint_params(fields, {}, Path("folder"), VOCAB) | {"max_tokens": NEW})


@pytest.fixture(scope="module")
def theirs(checkpoints):
    pytest.importorskip("torch")
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(checkpoints("llama").folder).eval()

    def generate(prompt, fields):
        ids = torch.tensor([prompt])
        config = GenerationConfig(**{"eos_token_id": EOS, "pad_token_id": 0, "max_new_tokens": NEW} | fields)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        return out[0, len(prompt) :].tolist()

    return generate


# Each is made of what comes without it, so that it changes something: (field, from the tokens of a prompt).
FIELDS = {
    "no_repeat_ngram_size-1": lambda tokens: {"no_repeat_ngram_size": 1},
    "no_repeat_ngram_size-2": lambda tokens: {"no_repeat_ngram_size": 2, "bad_words_ids": [tokens[2:3]]},
    "no_repeat_ngram_size-3": lambda tokens: {"no_repeat_ngram_size": 3, "suppress_tokens": tokens[4:9]},
    "suppress_tokens": lambda tokens: {"suppress_tokens": [*tokens[:3], -1]},
    "begin_suppress_tokens": lambda tokens: {"begin_suppress_tokens": tokens[:1]},
    "bad_words_ids": lambda tokens: {"bad_words_ids": [tokens[:1], tokens[3:5], tokens[6:9], [EOS]]},
    "bad_words_ids-prompt": lambda tokens: {"bad_words_ids": [[PROMPTS[1][-1], tokens[0]]]},
    "min_new_tokens": lambda tokens: {"eos_token_id": tokens[3], "min_new_tokens": 9},
    "min_length": lambda tokens: {"eos_token_id": tokens[3], "min_length": 17},
    "min_length-unused": lambda tokens: {"eos_token_id": tokens[3], "min_length": 25, "min_new_tokens": 5},
    "forced_bos_token_id": lambda tokens: {"forced_bos_token_id": 77, "begin_suppress_tokens": tokens[:2]},
    "forced_eos_token_id": lambda tokens: {"forced_eos_token_id": EOS},
    "forced_eos_token_ids": lambda tokens: {"forced_eos_token_id": [EOS]},
    "exponential_decay_length_penalty": lambda tokens: {"exponential_decay_length_penalty": [4, 1.5]},
    "sequence_bias": lambda tokens: {"sequence_bias": [[[tokens[0]], -30.0], [[11], 0.5]]},
    "repetition_penalty": lambda tokens: {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "all": lambda tokens: {
        "no_repeat_ngram_size": 2,
        "suppress_tokens": tokens[:1],
        "begin_suppress_tokens": tokens[1:2],
        "bad_words_ids": [tokens[2:4], [8]],
        "min_new_tokens": 6,
        "forced_eos_token_id": EOS,
        "exponential_decay_length_penalty": [8, 1.2],
    },
}


@pytest.mark.parametrize("name", FIELDS)
def test_greedy_tokens_are_transformers(llm, plain, theirs, monkeypatch, name):
    """All prompts at once, beside one that asks for nothing."""
    wanted = [FIELDS[name](tokens) for tokens in plain]
    expected = [theirs(prompt, fields) for prompt, fields in zip(PROMPTS, wanted, strict=True)]
    for prompt, fields, tokens in zip(PROMPTS, wanted, expected, strict=True):
        monkeypatch.setattr(llm.engine, "eos_token_ids", (fields.get("eos_token_id", EOS),))
        ours, other = llm.generate(
            [prompt, PROMPTS[2]], [params_of(fields), params_of({}).with_changes(ignore_eos=True)]
        )
        assert agree(llm, prompt, ours.outputs[0].token_ids, tokens), (fields, ours.outputs[0].token_ids, tokens)
        assert other.outputs[0].token_ids[: len(plain[2])] == plain[2]
    assert expected != plain


def agree(llm, prompt, ours, expected):
    """Equal, or different only where two logits lie next to each other."""
    for i, (a, b) in enumerate(zip(ours, expected, strict=False)):
        if a != b:
            logits = all_logits(llm, prompt + ours[:i])[-1]
            return abs(logits[a] - logits[b]) < 1e-4
    return len(ours) == len(expected)


def test_the_file_is_obeyed_and_ones_own_parameters_are_not_touched(llm, plain, checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints("llama").folder, tmp_path / "model")
    first = plain[1][0]
    asked = {"eos_token_id": EOS, "suppress_tokens": [first], "min_new_tokens": 40, "max_new_tokens": 6}
    (folder / "generation_config.json").write_text(json.dumps(asked))
    with LLM(folder, max_num_seqs=4, max_num_batched_tokens=32, page_size=8) as other:
        params = other.get_default_sampling_params()
        assert params == SamplingParams(temperature=0.0, suppress_tokens=[first], min_tokens=6, max_tokens=6)
        (output,) = other.generate(PROMPTS[1])
        assert len(output.outputs[0].token_ids) == 6
        assert first not in output.outputs[0].token_ids
        (own,) = other.generate(PROMPTS[1], SamplingParams(temperature=0.0, max_tokens=6))
        assert own.outputs[0].token_ids == plain[1][:6]


def test_without_a_generation_config_the_config_has_the_fields(tmp_path):
    config = {"no_repeat_ngram_size": 3, "model_type": "gpt2", "temperature": 0.5, "max_length": 50}
    assert checkpoint_params({}, config, tmp_path, VOCAB) == {
        "temperature": 0.0,
        "no_repeat_ngram_size": 3,
        "max_tokens": 16,
    }
    assert "no_repeat_ngram_size" not in checkpoint_params({"do_sample": True}, config, tmp_path, VOCAB)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("no_repeat_ngram_size", "3"),
        ("suppress_tokens", [1.5]),
        ("bad_words_ids", [[]]),
        ("min_new_tokens", True),
        ("max_new_tokens", 0),
        ("forced_eos_token_id", "2"),
        ("exponential_decay_length_penalty", [3]),
        ("stop_strings", 7),
        ("typical_p", 2),
        ("sequence_bias", [[[1, 2], 3.0]]),
        ("sequence_bias", {"a": 1}),
        *((name, 2 if nothing == 1 else "yes") for name, nothing in NOT_DONE.items()),
    ],
)
def test_what_is_not_done_is_named_once_and_loads(caplog, field, value):
    with caplog.at_level(logging.WARNING, "jaxinfer"):
        params = params_of({"do_sample": True, field: value})
    assert params == SamplingParams(max_tokens=NEW)
    assert caplog.text.count(field) >= 1
    assert len(caplog.records) == 1


def test_do_sample_is_true_or_false(caplog):
    with caplog.at_level(logging.WARNING, "jaxinfer"):
        assert params_of({"do_sample": "yes", "top_k": 5}) == SamplingParams(temperature=0.0, max_tokens=NEW)
    assert "do_sample 'yes' is left out: it must be true or false" in caplog.text


def test_what_decides_nothing_is_not_mentioned(caplog):
    idle = {"num_beams": 1, "encoder_repetition_penalty": 1.0, "top_h": None, "use_cache": True, "max_length": 4096}
    with caplog.at_level(logging.WARNING, "jaxinfer"):
        fields = idle | {"length_penalty": 1.0, "suppress_tokens": [-1, 300], "forced_bos_token_id": 300}
        assert params_of(fields) == SamplingParams(temperature=0.0, max_tokens=NEW, suppress_tokens=())
    assert not caplog.records
