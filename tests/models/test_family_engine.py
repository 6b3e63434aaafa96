"""What families vary in, through the engine: prompts in pieces beside rows that decode, with keys and values cached.

Variants are those of test_families.py; here are some that differ in what the engine's attention has to do.
"""

import jax
import numpy as np
import pytest

from jaxinfer import LLM, SamplingParams
from tests.checkpoints import same_tokens
from tests.models.test_families import PROMPT, TOKENS, reference

NAMES = [
    *("gemma2-window", "gemma3_text", "gemma4_text", "gemma4_text-small-shared-tied-hub", "gemma4_text-pattern"),
    *("gpt_oss", "hunyuan_v1_moe-layers-bias", "llama4-older", "llama4_text-dense", "mixtral"),
    *("phimoe-window-bias-tied", "qwen2_moe-dense-window", "qwen3_next"),
]
PROMPTS = (PROMPT, 45)  # tokens: the other one takes two steps


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_and_scores(checkpoints, name):
    found = reference(checkpoints.root, name, "large", greedy=True)
    prompts = [{"prompt_token_ids": found.tokens[:size]} for size in PROMPTS]
    params = [SamplingParams(temperature=0.0, max_tokens=TOKENS - size, ignore_eos=True) for size in PROMPTS]
    with LLM(found.folder, dtype="float32", max_num_batched_tokens=32, max_num_seqs=4) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        (scored,) = llm.score([found.tokens])
    for size, output in zip(PROMPTS, outputs, strict=True):
        assert same_tokens(output.outputs[0].token_ids, found.tokens[size:], found.gaps[size - 1 : -1])
    expected = jax.nn.log_softmax(found.logits)[np.arange(TOKENS - 1), found.tokens[1:]]
    np.testing.assert_allclose(scored.logprobs, expected, atol=1e-4)
