"""Beam search against transformers: sequences and scores."""

import numpy as np
import pytest

from jaxinfer import LLM, SamplingParams
from tests.engine.reference import all_logits

NEW = 10
PROMPTS = [np.random.default_rng(40 + i).integers(0, 250, n).tolist() for i, n in enumerate((3, 40))]


@pytest.fixture(scope="module")
def llm(checkpoints):
    with LLM(checkpoints("llama").folder, max_num_seqs=8, max_num_batched_tokens=32, page_size=8) as llm:
        yield llm
        assert llm.stats.pages_used == 0
        assert llm.engine.idle


@pytest.fixture(scope="module")
def model(checkpoints):
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoints("llama").folder).eval()


def reference(model, prompt, width, length_penalty, eos):
    """transformers' sequences, without what follows an EOS, and their scores."""
    import torch

    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        num_beams=width,
        num_return_sequences=width,
        do_sample=False,
        early_stopping=False,
        length_penalty=length_penalty,
        max_new_tokens=NEW,
        eos_token_id=list(eos) or None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    sequences = []
    for sequence in out.sequences[:, len(prompt) :].tolist():
        ends = [i for i, token in enumerate(sequence) if token in eos]
        sequences.append(sequence[: ends[0] + 1] if ends else sequence)
    return sequences, out.sequences_scores.numpy()


@pytest.mark.parametrize("width", [2, 4, 6])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_sequences_and_scores_are_transformers(llm, model, monkeypatch, width, length_penalty):
    free, _ = reference(model, PROMPTS[0], 4, 1.0, ())
    ended = 0
    for eos in ((), (free[0][5],), (free[0][3], free[2][8])):
        if max(2, 1 + len(eos)) * width > 20:
            continue
        monkeypatch.setattr(llm.engine, "eos_token_ids", eos)
        prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        outputs = llm.beam_search(prompts, beam_width=width, max_tokens=NEW, length_penalty=length_penalty)
        for prompt, output in zip(PROMPTS, outputs, strict=True):
            expected, scores = reference(model, prompt, width, length_penalty, eos)
            ours = [sequence.token_ids for sequence in output.sequences]
            assert len(ours) == width
            np.testing.assert_allclose([s.score for s in output.sequences], scores, atol=2e-4 * NEW)
            if np.all(np.abs(np.diff(scores)) > 1e-4):
                assert ours == expected
            else:
                assert sorted(ours) == sorted(expected)
            for sequence in output.sequences:
                length = len(sequence.token_ids)
                assert sequence.score == pytest.approx(sequence.cumulative_logprob / length**length_penalty)
                assert sequence.finish_reason == ("stop" if sequence.token_ids[-1] in eos else "length")
                ended += sequence.finish_reason == "stop"
                assert sequence.text == llm.tokenizer.decode(sequence.token_ids)
                check_logprob(llm, prompt, sequence)
    assert ended or width == 2 or length_penalty == 2.0  # few ends are among the best there


def check_logprob(llm, prompt, sequence):
    logits = all_logits(llm, prompt + sequence.token_ids)[len(prompt) - 1 : -1].astype(np.float64)
    values = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    total = values[np.arange(len(sequence.token_ids)), sequence.token_ids].sum()
    assert sequence.cumulative_logprob == pytest.approx(total, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mistral-window", "qwen3-layer_types-bias"])
def test_with_windows(checkpoints, name):
    """Whose pages go back while other beams hold them."""
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    folder = checkpoints(name).folder
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with LLM(folder, max_num_seqs=8, max_num_batched_tokens=32, page_size=4) as llm:
        outputs = llm.beam_search(PROMPTS, beam_width=4, max_tokens=NEW, ignore_eos=True)
        for prompt, output in zip(PROMPTS, outputs, strict=True):
            expected, scores = reference(model, prompt, 4, 1.0, ())
            np.testing.assert_allclose([s.score for s in output.sequences], scores, atol=2e-4 * NEW)
            assert sorted(s.token_ids for s in output.sequences) == sorted(expected)
        assert any(group.window for group in llm.engine.runner.programs.layout.groups)
        assert llm.stats.pages_used == 0


@pytest.mark.parametrize("length_penalty", [-32, 32.0])
def test_scores_are_numbers_with_any_penalty(llm, length_penalty):
    (output,) = llm.beam_search(PROMPTS[1], beam_width=2, max_tokens=NEW, length_penalty=length_penalty)
    assert all(np.isfinite(s.score) and s.score < 0 for s in output.sequences)


def test_width_one_is_greedy(llm):
    greedy = llm.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True))
    beams = llm.beam_search(PROMPTS, beam_width=1, max_tokens=NEW, ignore_eos=True)
    assert [[s.token_ids for s in beam.sequences] for beam in beams] == [[g.outputs[0].token_ids] for g in greedy]


def test_the_prefix_cache_has_all_but_the_last_page(llm):
    before = llm.stats
    prompt = np.random.default_rng(1).integers(0, 250, 96).tolist()
    llm.beam_search(prompt, beam_width=4, max_tokens=NEW, ignore_eos=True)
    assert llm.stats.prefill_tokens - before.prefill_tokens < 96 + 4 * NEW * 2 * 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beam_width": 11}, "beam_width is 11: it must be from 1 to 10 with 1 EOS ids"),
        ({"beam_width": 0}, "beam_width is 0: it must be"),
        ({"beam_width": True}, "beam_width is True: it must be"),
        ({"beam_width": "2"}, "beam_width is '2': it must be"),
        ({"beam_width": 2, "max_tokens": True}, "max_tokens is True: it must be an integer"),
        ({"beam_width": 2, "ignore_eos": 1}, "ignore_eos is 1: it must be True or False"),
        *(
            ({"beam_width": 2, "length_penalty": bad}, "length_penalty is .*: it must be a number from -32 to 32")
            for bad in (float("nan"), float("inf"), 1e6, -1e3, "1", None, True)
        ),
        ({"beam_width": 2, "max_tokens": 0}, "max_tokens is 0: it must be"),
        ({"beam_width": 2, "max_tokens": 250}, "max_tokens is 250: with a prompt of 40 tokens it may be at most 216"),
    ],
)
def test_what_can_not_be_is_refused(llm, options, message):
    with pytest.raises(ValueError, match=message):
        llm.beam_search(PROMPTS, **({"max_tokens": NEW} | options))
