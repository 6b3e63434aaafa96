"""The table of programs, what each takes, and which are called for what."""

import jax
import pytest

from jaxinfer import LLM, SamplingParams
from jaxinfer.engine.buckets import Buckets
from jaxinfer.engine.programs import Programs
from jaxinfer.engine.runner import Runner
from jaxinfer.models.model import AbstractModel

CONFIG = {
    "model_type": "llama",
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
}


def programs(quantization=None, **fields):
    model = AbstractModel.from_config(CONFIG | fields, "float32", quantization)
    sizes = {"num_pages": 9, "page_size": 16, "max_model_len": 4096, "max_rows": 256, "max_steps": 32}
    return Programs(model, jax.devices()[0], Buckets.make(256, 2048), **sizes)


def test_the_table():
    """Forwards by tokens alone, samples by rows alone."""
    keys = programs().keys()
    assert len(keys) == len(set(keys)) == 37
    assert [size for kind, size in keys if kind == "forward"] == [64, 128, 256, 512, 1024, 2048]
    assert [size for kind, size in keys if kind == "sample"] == [16, 256]
    assert [size for kind, size in keys if kind == "full_sample"] == [16, 256]
    assert [size for kind, size in keys if kind == "full_decode"] == [1, 4, 16, 64, 256]
    assert [size for kind, size in keys if kind == "guided_sample"] == [16, 256]
    assert [size for kind, size in keys if kind == "decode_forward"] == [1, 4, 16, 64, 256]
    assert [size for kind, size in keys if kind == "score"] == [2048]


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_head_s_parameters(tied, quantization):
    """Sampling and scoring take them and no others, and no cache."""
    table = programs(tie_word_embeddings=tied, quantization=quantization)
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    scale = {f"{head}_scale"} if quantization and not tied else set()
    for key in (("sample", 16), ("score", 2048)):
        params, changed, read, *_ = table[key].arguments
        assert set(params) == {"model.norm.weight", head} | scale
        assert changed.cache is read.cache is None
        assert read.hidden.shape == (2048, 32)
    assert changed.slots is None, "scoring changes nothing"
    assert set(table["forward", 64].arguments[0]) == set(table.model.abstract)


def test_what_is_called(checkpoints, monkeypatch):
    """Nobody pays for what nobody asks: a text that is scored samples nothing, and others score nothing."""
    called, call = [], Runner._call
    monkeypatch.setattr(
        Runner, "_call", lambda self, calls, *rest: called.append([key for key, _ in calls]) or call(self, calls, *rest)
    )
    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 32}
    with LLM(checkpoints("llama").folder, **sizes) as llm:
        assert called == [[("zeros", 1)]]
        prompts = [list(range(3, 43)), [5, 6, 7]]

        def calls(task, *arguments):
            called.clear()
            task(prompts, *arguments, use_tqdm=False)
            return called

        greedy = {"temperature": 0.0, "max_tokens": 2, "ignore_eos": True}
        mixed = [[("forward", 32), ("sample", 4)]] * 2
        assert calls(llm.generate, SamplingParams(**greedy)) == [*mixed, [("decode", 2)]]
        assert calls(llm.score) == [[("forward", 32), ("score", 32)]] * 2
        both = calls(llm.generate, SamplingParams(**greedy, prompt_logprobs=0))
        assert both[0] == [("forward", 32), ("score", 32)], "the first chunk of a prompt ends none"
        assert both[1] == [("forward", 32), ("score", 32), ("sample", 4)]
        *_, chunk, decode = calls(llm.generate, SamplingParams(**greedy, repetition_penalty=1.1))
        assert called.count([("prepare counts", 1)]) == 2
        assert (chunk, decode) == ([("forward", 32), ("full_sample", 4)], [("full_decode", 4)])
        one_of_two = [SamplingParams(**greedy), SamplingParams(**greedy, logprobs=0)]
        assert calls(llm.generate, one_of_two)[-2:] == [[("forward", 32), ("full_sample", 4)], [("full_decode", 4)]]
