"""Every architecture and every config variant against transformers, in float32."""

import jax
import numpy as np
import pytest

from jaxinfer import LLM, SamplingParams
from jaxinfer.attention import ForwardBatch
from jaxinfer.models.registry import model_types
from tests.checkpoints import NEW_TOKENS, VARIANTS, same_tokens
from tests.models.families import variants
from tests.models.random_fields import ours

GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
ENGINES = {name for name in VARIANTS if "-" not in name or "window" in name or "layer_types" in name}
OFTEN = ("llama", "gpt2", "mistral-window")


def test_every_architecture_has_a_variant():
    assert {name.split("-")[0] for name in (*VARIANTS, *variants())} == set(model_types())


def check(reference, logits):
    assert np.abs(np.asarray(logits) - reference.logits).max() / np.abs(reference.logits).max() < 1e-4


@pytest.mark.parametrize("name", sorted(VARIANTS.keys() - ENGINES))
def test_logits_and_greedy_tokens(checkpoints, name):
    """What these differ in is arithmetic: a forward shows it."""
    reference = checkpoints(name)
    prompt, greedy = reference.prompts[-1], reference.greedy[-1]
    logits = ours(reference.folder, prompt + greedy)
    check(reference, logits[: len(prompt)])
    chosen = logits[len(prompt) - 1 : -1].argmax(axis=-1).tolist()
    assert same_tokens(chosen, greedy, reference.gaps[-1])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow) for name in sorted(ENGINES)]
)
def test_engines(checkpoints, name):
    reference = checkpoints(name)
    # Prompts longer than 32 tokens are prefilled in pieces, beside rows that already decode.
    with LLM(reference.folder, max_num_batched_tokens=32, max_num_seqs=4) as llm:
        prompt = reference.prompts[-1]
        batch = ForwardBatch.of_sequences([prompt])
        params = llm.engine.runner.params
        logits, _ = jax.jit(lambda params, batch: llm.model.bind(params)(batch, None))(params, batch)
        check(reference, logits)

        (scored,) = llm.score([prompt])
        expected = jax.nn.log_softmax(reference.logits)[np.arange(len(prompt) - 1), prompt[1:]]
        np.testing.assert_allclose(scored.logprobs, expected, atol=1e-4)

        (alone,) = llm.generate(reference.prompts[1], GREEDY)
        assert same_tokens(alone.outputs[0].token_ids, reference.greedy[1], reference.gaps[1])
        together = llm.generate([{"prompt_token_ids": p} for p in reference.prompts], GREEDY)
        for output, expected, gaps in zip(together, reference.greedy, reference.gaps, strict=True):
            assert same_tokens(output.outputs[0].token_ids, expected, gaps)
            assert output.outputs[0].finish_reason == "length"
